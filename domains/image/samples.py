"""The domain's samples: pictures [B, 3, H, W] in [0, 1]; grey ones have equal channels."""

import torch
from torch import Tensor

from lit_rlft.kit.images import check_pictures

__all__ = ["check_pictures", "luminance"]


def luminance(pictures: Tensor) -> Tensor:
    """Return the luma of pictures [B, 3, H, W] by ITU-R BT.601, [B, 1, H, W]."""
    weights = torch.tensor([0.299, 0.587, 0.114]).to(pictures)
    return (pictures * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
