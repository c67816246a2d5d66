"""Parts of several domains' metrics: distances from a source's data, sums over others."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lit_rlft.core.checks import at_least
from lit_rlft.core.reward import LeftOut, SetMetric
from lit_rlft.kit.leave_out import frechet_left_out, mmd_left_out
from lit_rlft.kit.statistics import FittedGaussian, mmd, polynomial, similarity

__all__ = ["RealFeatures", "SourceDistances", "pseudo_values", "sums_over_others"]

R = TypeVar("R")


@dataclass(frozen=True)
class RealFeatures:
    """Features of real data that sets of samples are compared with.

    Attributes:
        features: [n, D].
        similarity: Mean polynomial kernel of every two of them, which MMD needs each time.
    """

    features: Tensor
    similarity: float

    @classmethod
    def of(cls, features: Tensor) -> "RealFeatures":
        """Keep features [n, D]."""
        return cls(features, similarity(features, polynomial))

    def frechet_distance(self, generated: Tensor) -> float:
        """Return the Fréchet distance of features [m, D], NaN for fewer than two."""
        return self.gaussian.frechet_distance(generated)

    def kernel_distance(self, generated: Tensor) -> float:
        """Return KID of features [m, D], of every pair at once, NaN for fewer than two."""
        return mmd(self.features, generated, polynomial, self.similarity)

    def distances_left_out(self, generated: Tensor, pairs: Tensor) -> tuple[LeftOut, LeftOut]:
        """Return Fréchet distance and KID without each of features [m, D], m at least 4, and pairs.

        Args:
            generated: Features.
            pairs: Places of the features of each pair, [P, 2].
        """
        kid = mmd_left_out(self.features, generated, polynomial, self.similarity, pairs)
        return frechet_left_out(generated, self.gaussian, pairs), kid

    @cached_property
    def gaussian(self) -> FittedGaussian:
        """The Gaussian fitted to the features, kept once it was needed."""
        return FittedGaussian.of(self.features)


class SourceDistances(SetMetric, Generic[R]):
    """Distances of all samples of an evaluation from the data of a source.

    The source's side of the comparison is computed when it is first needed, and kept.

    Args:
        num_draws: Groups of samples left out in turn for the standard errors of a test, where these
            have no closed form; 0 leaves all errors out.
    """

    def __init__(self, num_draws: int = 20) -> None:
        super().__init__()
        at_least(0, self, num_draws=num_draws)
        self.num_draws = num_draws
        self._real: R | None = None

    @abstractmethod
    def read(self) -> R:
        """Load the source and return its side of the comparison."""

    @property
    def real(self) -> R:
        """The source's side of the comparison."""
        if self._real is None:
            with torch.no_grad():
                self._real = self.read()
        return self._real


def sums_over_others(distances: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's sum of distances to the others of its condition, and their number, [B].

    Args:
        distances: Of every two samples, [B, B].
        rows: [B], which condition each sample has.
    """
    others = rows[:, None] == rows[None, :]
    others.fill_diagonal_(False)
    return distances.where(others, 0).sum(dim=1), others.sum(dim=1)


def pseudo_values(means: Tensor, rows: Tensor) -> Tensor:
    r"""Return the jackknife's pseudo-values of a mean distance of pairs, [B].

    A distance counts in both of its samples. Their mean distances :math:`d_i` to the others move
    together, and the error of a mean over them would be half of the true one. With n samples of a
    condition and the mean :math:`\bar d` of theirs, the value without sample i is
    :math:`(n \bar d - 2 d_i) / (n - 2)`, and the pseudo-value is

    .. math:: \bar d + \frac{2 (n - 1)}{n - 2} (d_i - \bar d).

    The mean of a condition stays what it is; the error of a mean over pseudo-values is right to
    first order. Two samples of a condition keep their one distance.

    Where the few samples of a condition are all of different rows of the data, the error is rough:
    up to 1.6 times the true one with four, 0.7 times with two.

    Args:
        means: Each sample's mean distance to the others of its condition, [B]; NaN stays and does
            not count.
        rows: int64 [B], which condition each sample has.

    References:
        The Jackknife Estimate of Variance (Efron & Stein, 1981)
    """
    known = ~means.isnan()
    _, places = torch.unique(rows, return_inverse=True)
    sums, counts = means.new_zeros(2, int(places.max()) + 1 if len(places) else 0)
    sums.index_add_(0, places, means.where(known, 0))
    counts.index_add_(0, places, known.to(means.dtype))
    centre, num = (sums / counts.clamp(min=1))[places], counts[places]
    # Two samples have one distance, from which nothing tells them apart.
    factor = torch.where(num > 2, 2 * (num - 1) / (num - 2).clamp(min=1), 1)
    return centre + factor * (means - centre)
