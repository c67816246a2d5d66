"""Text features of captions of several lengths in one table."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["filled", "masked"]


def filled(captions: Sequence[Tensor], length: int) -> Tensor:
    """Return captions as rows of one length, [B, L, F + 1].

    Args:
        captions: Features [L', F] each, of at most L tokens.
        length: L.

    Returns:
        The further column is 1 for a token of the caption and 0 for the zeros after its end.
    """
    marked = [pad(caption, (0, 1), value=1.0) for caption in captions]
    return torch.stack([pad(own, (0, 0, 0, length - len(own))) for own in marked])


def masked(captions: Tensor, mask: Tensor) -> Tensor:
    """Return captions of one length as rows [B, L, F + 1], as `filled` does.

    Args:
        captions: Features [B, L, F], also of places after the end.
        mask: [B, L], 1 for a token of the caption and 0 after its end.
    """
    there = mask.to(captions).unsqueeze(-1)
    return torch.cat([captions.where(there > 0, 0.0), there], dim=-1)
