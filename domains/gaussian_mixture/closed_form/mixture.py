r"""Isotropic Gaussian mixtures, :math:`p(x) = \sum_k w_k N(x; m_k, s_k^2 I)`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, finite, positive

__all__ = ["MEANS", "STDS", "WEIGHTS", "Mixture"]

WEIGHTS = (0.3, 0.25, 0.2, 0.15, 0.1)
MEANS = ((0.0, 1.4), (-1.33, 0.43), (-0.82, -1.13), (0.82, -1.13), (1.33, 0.43))
STDS = (0.2, 0.25, 0.2, 0.25, 0.2)
"""The default: five modes on a circle, about as wide as the unit normal that sampling starts at."""


@dataclass(frozen=True)
class Mixture:
    """The parameters of a mixture of K isotropic Gaussians in d dimensions.

    Attributes:
        weights: [K], positive; normalised to sum 1.
        means: [K, d].
        stds: [K], positive.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def of(
        cls,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        owner: object = None,
    ) -> "Mixture":
        """Check the settings of a mixture and return it in float64.

        Args:
            weights: K numbers above 0.
            means: K points of d numbers.
            stds: K numbers above 0.
            owner: Whose settings they are, for messages.

        Raises:
            UsageError: Lengths differ, a weight or std is not positive, or there is no component.
        """
        if not weights or not len(weights) == len(means) == len(stds):
            raise UsageError(
                "weights, means and stds need one entry per component, got "
                f"{len(weights)}, {len(means)} and {len(stds)}"
            )
        positive(owner or cls, weights=weights, stds=stds)
        finite(owner or cls, means=means)
        if len({len(mean) for mean in means}) != 1 or not means[0]:
            raise UsageError("means must all have the same number of coordinates, at least one")
        share = torch.tensor(list(weights), dtype=torch.float64)
        points = torch.tensor([list(mean) for mean in means], dtype=torch.float64)
        return cls(share / share.sum(), points, torch.tensor(list(stds), dtype=torch.float64))

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw points, [num, d] in the dtype of the means."""
        chosen = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        shape = (num, self.means.shape[1])
        noise = torch.randn(shape, dtype=self.means.dtype, generator=generator)
        return self.means[chosen] + self.stds[chosen].unsqueeze(-1) * noise

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-density of points [..., d], [...]."""
        squares = (points.unsqueeze(-2) - self.means).square().sum(dim=-1)
        dims = self.means.shape[1]
        logs = -0.5 * squares / self.stds**2 - dims * (self.stds.log() + _HALF_LOG_2_PI)
        return (self.weights.log() + logs).logsumexp(dim=-1)

    def nearest(self, points: Tensor) -> Tensor:
        """Return the component whose mean is nearest to each point [B, d], int64 [B]."""
        means = self.means.to(points)
        return (points.unsqueeze(1) - means).square().sum(dim=-1).argmin(dim=1)


_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
