"""Rewards of a picture's colours and symmetry, for any prompt."""

from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.samples import check_pictures
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward

__all__ = ["Brightness", "Colourfulness", "Symmetry"]


class Brightness(Reward):
    """Mean luma, in [0, 1]: r(x) = mean(0.299 R + 0.587 G + 0.114 B) over pixels.

    References:
        Studio encoding parameters of digital television (ITU-R BT.601-7, 2011), section 2.5.1,
        https://www.itu.int/rec/R-REC-BT.601
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the brightness of each picture, [B]."""
        r, g, b = check_pictures(samples, condition).flatten(2).mean(dim=2).unbind(1)
        return 0.299 * r + 0.587 * g + 0.114 * b


class Colourfulness(Reward):
    """Colourfulness of pictures, in [0, 1.2], 0 for grey ones.

    r(x) = sqrt(var(u) + var(v)) + 0.3 sqrt(mean(u)^2 + mean(v)^2) over pixels, of the opponent
    colours u = R - G and v = (R + G) / 2 - B. The paper measures on colours up to 255, where 33 is
    moderately and 109 extremely colourful: 0.13 and 0.43 here.

    References:
        Measuring colourfulness in natural images (Hasler, Suesstrunk, 2003),
        https://doi.org/10.1117/12.477378
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the colourfulness of each picture, [B]."""
        r, g, b = check_pictures(samples, condition).flatten(2).unbind(1)
        opponents = torch.stack([r - g, (r + g) / 2 - b])
        spread = opponents.var(dim=-1, correction=0).sum(dim=0)
        mean = opponents.mean(dim=-1).square().sum(dim=0)
        return _smooth_sqrt(spread) + 0.3 * _smooth_sqrt(mean)


class Symmetry(Reward):
    """How symmetric a picture is: minus the mean difference from its mirror image, in [-1, 0].

    r(x) = -mean |x - flip(x)| over channels and pixels; the mirror swaps left and right.
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the symmetry of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        return -(pictures - pictures.flip(-1)).abs().flatten(1).mean(dim=1)


def _smooth_sqrt(values: Tensor, eps: float = 1e-8) -> Tensor:
    # 0 at 0, where the gradient of sqrt is infinite; elsewhere at most sqrt(eps) too low.
    return (values + eps).sqrt() - eps**0.5
