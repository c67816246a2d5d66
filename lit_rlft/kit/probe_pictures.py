"""Pictures that have nothing in common, drawn by code: any reward that sees them differs."""

import torch
from torch import Tensor

__all__ = ["probe_pictures"]


def probe_pictures(height: int, width: int) -> Tensor:
    """Return four pictures [4, 3, height, width] in [0, 1], the same ones in every run.

    They are a colour gradient, a dark disc on white, a red and blue chequerboard, and noise.
    """
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    gradient = torch.stack([x, y, 1 - x])
    outside = ((x - 0.5).square() + (y - 0.5).square() > 0.1).float()
    disc = (0.1 + 0.9 * outside).expand(3, -1, -1)
    red = ((4 * x).floor() + (4 * y).floor()).remainder(2)
    squares = torch.stack([red, 0.2 * torch.ones_like(red), 1 - red])
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return torch.stack([gradient, disc, squares, noise])
