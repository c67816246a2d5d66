"""Points as small pictures: a dot on a plane, before the bands of a mixture's density."""

import torch
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import Mixture

__all__ = ["Plane"]

_SIZE = 64
_RADIUS = 2.5  # of the dot, in pixels
_BANDS = (0.01, 0.1, 0.4)  # of the highest density
_DOT = (0.8, 0.1, 0.1)


class Plane:
    """The square around a mixture, first two coordinates to the right and up.

    One-dimensional points lie on the horizontal through the middle. Coordinates beyond the second
    are not shown, and points beyond the edge are drawn on it.

    Args:
        mixture: Its density, marginal over what is not shown, is the background.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.reach = float((mixture.means.abs().amax(dim=1) + 4 * mixture.stds).max())
        shown = Mixture(mixture.weights, _flat(mixture.means.float()), mixture.stds)
        axis = torch.linspace(-self.reach, self.reach, _SIZE)
        self.grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), dim=-1)  # [H, W, 2]
        density = shown.log_prob(self.grid.double()).exp()
        bands = [(density > share * density.max()).float() for share in _BANDS]
        self.background = 1 - 0.08 * torch.stack(bands).sum(dim=0)  # [H, W]

    def draw(self, points: Tensor) -> Tensor:
        """Return pictures of points [B, d], [B, 3, 64, 64] in [0, 1]."""
        places = _flat(points.detach().float().cpu()).clamp(-self.reach, self.reach)
        pixel = 2 * self.reach / (_SIZE - 1)
        distance = (self.grid - places[:, None, None, :]).norm(dim=-1) / pixel
        # One pixel of soft edge instead of a staircase.
        ink = (_RADIUS + 0.5 - distance).clamp(0, 1).unsqueeze(1)
        color = torch.tensor(_DOT).view(1, 3, 1, 1)
        return ink * color + (1 - ink) * self.background


def _flat(points: Tensor) -> Tensor:
    """Return the first two coordinates, the second 0 where there is none, [..., 2]."""
    return torch.nn.functional.pad(points, (0, 1))[..., :2]
