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

__all__ = ["RealFeatures", "SourceDistances", "sums_over_others"]

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
