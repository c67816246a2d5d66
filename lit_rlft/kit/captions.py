"""Text features of captions of several lengths in one table."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["filled"]


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
