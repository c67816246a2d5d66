r"""Subspaces that states live in: sets with empty slots, and coordinates around a common centre.

A :class:`PointClouds` state holds n points in N slots. Noise is the projection of N(0, I) onto what
exists: nothing in empty slots, and coordinates whose mean over the points is 0, which leaves
n - 1 of n numbers free in each of them. With independent stds :math:`s_i` before the projection,
weights :math:`w_i = 1/s_i^2` and offsets :math:`d_i` from the mean, one coordinate has

.. math::
    -2 \log p = \sum_i w_i (d_i - \bar d_w)^2 + \sum_i \log s_i^2
                + \log\Big(\tfrac{1}{n}\sum_i w_i\Big) + (n - 1) \log 2\pi, \qquad
    \bar d_w = \frac{\sum_i w_i d_i}{\sum_i w_i}

(the shift along the removed direction integrated out; the determinant is that of
:math:`Q^\top \mathrm{diag}(s^2) Q` for an orthonormal basis Q of the subspace). Where all
:math:`s_i` are equal this is the usual density in n - 1 dimensions.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022), Section 3.1 and
    Appendix A: the isotropic case, https://arxiv.org/abs/2203.17003
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import (
    Distribution,
    Gaussian,
    Reduction,
    density_of,
    squared_distances,
)
from lit_rlft.core.randomness import Generators, randn_like
from lit_rlft.core.state import State, tensor_of

__all__ = ["PointCloudGaussian", "PointClouds", "Points", "Subspace", "occupied"]


class Subspace(ABC):
    """The part of a tensor state that exists; the rest carries no noise, loss or probability.

    The part can differ between samples. Every state of a trajectory shows it (`like` below): the
    pipeline's blank, x_1, x_t and x_0.
    """

    @abstractmethod
    def project(self, x: Tensor, like: Tensor) -> Tensor:
        """Return the nearest state that exists where `like` does, [B, ...]."""

    def support(self, like: Tensor) -> Any:
        """Return what `gaussian` has to know of the states of one walk, of which `like` is one."""
        return like

    @abstractmethod
    def gaussian(
        self,
        loc: Tensor,
        std: Tensor,
        like: Any,
        density: tuple[Tensor, Tensor] | None = None,
    ) -> Gaussian:
        """Return the distribution of the projection of N(loc, std^2).

        Args:
            loc: [B, ...].
            std: Broadcastable against `loc`.
            like: A state, or its `support`.
            density: `density_of(std)`, where it is known.
        """

    @abstractmethod
    def num_dimensions(self, like: Tensor) -> Tensor:
        """Return how many numbers of each sample are free, float64 [B]."""

    def couple(self, noise: Tensor, x: Tensor) -> Tensor:
        """Return the noise to mix with x in training, of the same distribution by symmetry."""
        return noise


class PointClouds(Subspace):
    """Sets of points [B, N, D]; the first channels are coordinates around the points' centre.

    A slot whose numbers are all exactly 0 is empty. Points must have another number in some
    channel, in the blank too.

    Args:
        num_coordinates: Channels whose mean over a sample's points is 0; the others are free.
    """

    def __init__(self, num_coordinates: int = 3) -> None:
        if num_coordinates < 0:
            raise UsageError(f"num_coordinates must be 0 or more, got {num_coordinates}")
        self.num_coordinates = num_coordinates

    def project(self, x: Tensor, like: Tensor) -> Tensor:
        return self.support(like).project(x)

    def support(self, like: "Tensor | Points") -> "Points":
        return like if isinstance(like, Points) else Points(like, self.num_coordinates)

    def gaussian(
        self,
        loc: Tensor,
        std: Tensor,
        like: "Tensor | Points",
        density: tuple[Tensor, Tensor] | None = None,
    ) -> "PointCloudGaussian":
        return PointCloudGaussian(loc, std, self.support(like), density)

    def num_dimensions(self, like: Tensor) -> Tensor:
        return self.support(like).num_dimensions


class Points:
    """Which slots of point clouds hold a point, for all states of a walk.

    Args:
        like: [B, N, D], one of them.
        num_coordinates: Channels whose mean over a sample's points is 0.

    Attributes:
        full: bool [B, N, 1], which slots hold a point.
    """

    def __init__(self, like: Tensor, num_coordinates: int) -> None:
        self.full, self.num_coordinates = occupied(like), num_coordinates
        self._num_channels, self._dtype = like.shape[-1], like.dtype

    @cached_property
    def empty(self) -> Tensor:
        """Which slots hold none, bool [B, N, 1]."""
        return ~self.full

    @cached_property
    def num_dimensions(self) -> Tensor:
        """How many numbers of each sample are free, float64 [B]."""
        num = self.full.sum(dim=(1, 2)).double()
        return num * self._num_channels - self.num_coordinates * num.clamp(max=1)

    @cached_property
    def free(self) -> Tensor:
        """The same in the states' type, [B]."""
        return self.num_dimensions.to(self._dtype)

    @cached_property
    def at_least_one(self) -> Tensor:
        """The same, but 1 where there are no points, [B]."""
        return self.free.clamp(min=1)

    @cached_property
    def _num(self) -> Tensor:
        """How many points there are, at least 1, [B, 1, 1]."""
        return self.full.sum(dim=1, keepdim=True).clamp(min=1)

    def project(self, x: Tensor) -> Tensor:
        """Return x [B, N, D] around the centre of its points, with nothing in empty slots."""
        return self.emptied(self.centred(self.emptied(x)))

    def emptied(self, x: Tensor) -> Tensor:
        """Return x [B, N, D] with nothing in empty slots."""
        return x.masked_fill(self.empty, 0)

    def centred(self, x: Tensor) -> Tensor:
        """Move x [B, N, D], which has nothing in empty slots, in place so that its centre is 0.

        Empty slots are moved as well; `emptied` is left to do.
        """
        coordinates = x[..., : self.num_coordinates]
        coordinates -= coordinates.sum(dim=1, keepdim=True) / self._num
        return x


class PointCloudGaussian(Gaussian):
    """The projection of independent normals N(loc, std^2) onto `PointClouds`.

    Its density is that of states in the subspace. Beside the subspace, as numbers stored in half
    precision are, the distance to it counts as well, the same for every law of that std.

    Args:
        loc: [B, N, D]; its projection is the mean.
        std: Broadcastable against `loc`, before the projection. A sample with a std of 0 is a
            point mass, as for `Gaussian`.
        points: Which slots hold a point.
        density: `density_of(std)`, where it is known.
    """

    def __init__(
        self,
        loc: Tensor,
        std: Tensor,
        points: Points,
        density: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.points, self.full, self.num_coordinates = points, points.full, points.num_coordinates
        self._moved = points.centred(points.emptied(loc))
        self.std, self._density = std, density

    @cached_property
    def loc(self) -> Tensor:  # type: ignore[override]
        """The mean, [B, N, D]."""
        return self.points.emptied(self._moved)

    @property
    def num_dimensions(self) -> Tensor:
        return self.points.num_dimensions

    def like(self, loc: Tensor, std: Tensor) -> "PointCloudGaussian":
        return PointCloudGaussian(loc, std, self.points)

    def rsample(self, noise: Generators = None) -> Tensor:
        drawn = randn_like(self._moved, noise, self._emptied_steps)
        # What is in empty slots is removed once, from the sum.
        return self.points.emptied(self._moved + self.points.centred(self.std * drawn))

    def _emptied_steps(self, noise: Tensor) -> Tensor:
        return noise.masked_fill(self.points.empty.unsqueeze(1), 0)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        x, points = tensor_of(state), self.points
        if self.std.dim() == 0 or self.std.shape[1:].numel() == 1:
            # All stds of a sample are equal: the density is the usual one of what exists.
            factor, peak = (one.flatten() for one in self._density or density_of(self.std))
            squares = points.emptied(squared_distances(x, self._moved)).sum(dim=(1, 2))
            values = torch.addcmul(points.free * peak, factor, squares)
            return values if reduction == "sum" else values / points.at_least_one
        offset, dimensions = x - self.loc, points.free
        weights = self._weights
        values = self._squares(offset, weights) + self._log_det + dimensions * math.log(2 * math.pi)
        return self._reduced(-0.5 * values, reduction)

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        if not isinstance(other, PointCloudGaussian):
            raise TypeError(f"no closed-form KL between point clouds and {type(other).__name__}")
        ours, theirs, own = self._weights, other._weights, self._coordinates
        ratio = theirs * self._spread.square()
        each = (ratio - 1 - ratio.where(self.full, 1).log()).where(self.full, 0).sum(dim=(1, 2))
        # What the removed direction takes from trace, dimensions and determinants.
        total, total_own = _positive(own(theirs).sum(dim=1)), _positive(own(ours).sum(dim=1))
        shared = (own(ratio) * own(theirs)).sum(dim=1) / total
        removed = (1 - shared + total.log() - total_own.log()).sum(dim=-1)
        removed = removed.where(self.full.any(dim=(1, 2)), 0)
        squares = self._squares(self.loc - other.loc, theirs)
        return self._reduced(0.5 * (squares + each + removed), reduction)

    def entropy(self, reduction: Reduction = "sum") -> Tensor:
        dimensions = self.num_dimensions.to(self.loc)
        values = 0.5 * (dimensions * (1 + math.log(2 * math.pi)) + self._log_det)
        return self._reduced(values, reduction)

    @property
    def _spread(self) -> Tensor:
        """The stds, positive, for every number, [B, N, D]."""
        return self._positive_std.to(self.loc).expand_as(self.loc)

    @property
    def _weights(self) -> Tensor:
        """1 / std^2, and 0 in empty slots, [B, N, D]."""
        return self._spread.pow(-2).where(self.full, 0)

    @property
    def _log_det(self) -> Tensor:
        """Log-determinant of the covariance in the subspace, [B]."""
        logs = 2 * self._spread.log().where(self.full, 0).sum(dim=(1, 2))
        num = self.full.sum(dim=1).clamp(min=1)
        totals = _positive(self._coordinates(self._weights).sum(dim=1))
        shift = (totals / num).log().sum(dim=-1)
        return logs + shift.where(self.full.any(dim=(1, 2)), 0)

    def _squares(self, offset: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted squares of an offset, coordinates from their weighted mean, [B]."""
        num = self.num_coordinates
        weight, distance = weights[..., :num], offset[..., :num]
        mean = (weight * distance).sum(dim=1, keepdim=True)
        mean = mean / _positive(weight.sum(dim=1, keepdim=True))
        squares = torch.cat([distance - mean, offset[..., num:]], dim=-1).square()
        return (weights * squares).sum(dim=(1, 2))

    def _coordinates(self, values: Tensor) -> Tensor:
        return values[..., : self.num_coordinates]

    def _reduced(self, values: Tensor, reduction: Reduction) -> Tensor:
        random = (self.std > 0).expand_as(self.loc).flatten(start_dim=1).all(dim=1)
        values = values.where(random, 0)
        if reduction == "sum":
            return values
        return values / self.num_dimensions.clamp(min=1).to(values)


def occupied(like: Tensor) -> Tensor:
    """Return which slots of point clouds [B, N, D] hold a point, bool [B, N, 1]."""
    return like.any(dim=-1, keepdim=True)


def _positive(total: Tensor) -> Tensor:
    """Return sums of weights; where there are none, 1."""
    return total.where(total > 0, 1)
