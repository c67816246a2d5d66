"""Plain statistics of pictures, in which exploited rewards show early."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import at_least, require
from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric

__all__ = ["PictureStatistics", "grid_strength"]

_LUMA = (0.299, 0.587, 0.114)
_SHIFT = 0.25
"""Share of the reference's value that a statistic may change by."""


class PictureStatistics(Metric):
    """Sharpness, saturation, contrast and grid artefacts of each picture.

    Preference models like pictures sharper and more colourful than those that people like, and
    decoders show the grid of their patches when latents leave the range they were trained on. Of
    the luma y (ITU-R BT.601):

    - "sharpness": mean absolute Laplacian of y, in [0, 4];
    - "saturation": mean of the largest minus the smallest channel, in [0, 1];
    - "contrast": standard deviation of y, in [0, 0.5];
    - "grid": `grid_strength` of y, the largest of all periods.

    A change by a quarter of the reference's value is a sign that the reward is exploited: in either
    direction of sharpness and contrast, upwards of the other two.

    Args:
        periods: Pixels from line to line of the grids that are looked for: those of a latent's
            pixel and of a transformer's patch, 8 and 16 unless given.

    Raises:
        BadArgument: There is no period, or one is below 2.
    """

    def __init__(self, periods: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        require(len(periods) > 0, self, "periods", "at least one number of pixels")
        at_least(2, self, periods=tuple(periods))
        self.periods = tuple(periods)

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the four statistics, [B] each; "grid" is NaN below two periods a side."""
        pictures = check_pictures(samples, condition).clamp(0, 1)
        weights = pictures.new_tensor(_LUMA).view(1, 3, 1, 1)
        luma = (pictures * weights).sum(dim=1)
        grids = torch.stack([grid_strength(luma, period) for period in self.periods])
        known = grids.nan_to_num(-1).amax(dim=0)
        return {
            "sharpness": _laplacian(luma).abs().mean(dim=(1, 2)),
            "saturation": (pictures.amax(dim=1) - pictures.amin(dim=1)).mean(dim=(1, 2)),
            "contrast": luma.flatten(1).std(dim=1, correction=0),
            "grid": known.where(known >= 0, torch.nan),
        }

    def guards(self) -> dict[str, Guard]:
        """Return all four."""
        either, higher = Guard("either", _SHIFT), Guard("higher", _SHIFT)
        return {"sharpness": either, "contrast": either, "saturation": higher, "grid": higher}


def grid_strength(luma: Tensor, period: int) -> Tensor:
    """Return how unevenly edges are spread over the places of a grid's cell, [B], from 0.

    The mean absolute differences of neighbouring columns, averaged over every column that lies at
    the same place of a cell: their standard deviation over their mean. The same of rows; the larger
    one counts. Lines every p pixels on a plain ground have sqrt(p / 2 - 1). NaN for pictures below
    two cells a side.

    Args:
        luma: [B, H, W].
        period: Pixels of a cell, p.
    """
    sides = [_unevenness(luma.transpose(1, 2), period), _unevenness(luma, period)]
    return torch.stack(sides).amax(dim=0)


def _unevenness(luma: Tensor, period: int) -> Tensor:
    """Return that of columns, [B]."""
    steps = luma.diff(dim=2).abs().mean(dim=1)
    if luma.shape[2] < 2 * period:
        return steps.new_full((len(steps),), torch.nan)
    places = torch.arange(steps.shape[1], device=steps.device) % period
    sums = steps.new_zeros(len(steps), period).index_add_(1, places, steps)
    profile = sums / torch.bincount(places, minlength=period)
    mean = profile.mean(dim=1)
    return profile.std(dim=1, correction=0) / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _laplacian(luma: Tensor) -> Tensor:
    kernel = luma.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(luma.unsqueeze(1), kernel.view(1, 1, 3, 3)).squeeze(1)
