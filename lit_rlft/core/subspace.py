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

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Distribution, Gaussian, Reduction, density_of
from lit_rlft.core.randomness import Generators, randn_like
from lit_rlft.core.state import State, tensor_of

__all__ = ["PointCloudGaussian", "PointClouds", "Subspace", "occupied"]


class Subspace(ABC):
    """The part of a tensor state that exists; the rest carries no noise, loss or probability.

    The part can differ between samples. Every state of a trajectory shows it (`like` below): the
    pipeline's blank, x_1, x_t and x_0.
    """

    @abstractmethod
    def project(self, x: Tensor, like: Tensor) -> Tensor:
        """Return the nearest state that exists where `like` does, [B, ...]."""

    @abstractmethod
    def gaussian(self, loc: Tensor, std: Tensor, like: Tensor) -> Gaussian:
        """Return the distribution of the projection of N(loc, std^2)."""

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
        return _project(x, occupied(like), self.num_coordinates)

    def gaussian(self, loc: Tensor, std: Tensor, like: Tensor) -> "PointCloudGaussian":
        return PointCloudGaussian(loc, std, occupied(like), self.num_coordinates)

    def num_dimensions(self, like: Tensor) -> Tensor:
        num = occupied(like).sum(dim=(1, 2))
        return _num_dimensions(num, like.shape[-1], self.num_coordinates)


class PointCloudGaussian(Gaussian):
    """The projection of independent normals N(loc, std^2) onto `PointClouds`.

    Args:
        loc: [B, N, D]; its projection is the mean.
        std: Broadcastable against `loc`, before the projection. A sample with a std of 0 is a
            point mass, as for `Gaussian`.
        full: bool [B, N, 1], which slots hold a point.
        num_coordinates: Channels whose mean over the points is 0.
    """

    def __init__(self, loc: Tensor, std: Tensor, full: Tensor, num_coordinates: int) -> None:
        self.full, self.num_coordinates = full, num_coordinates
        self._num = full.sum(dim=1, keepdim=True)
        super().__init__(self._projected(loc), std)

    def _projected(self, x: Tensor) -> Tensor:
        return _project(x, self.full, self.num_coordinates, self._num)

    @property
    def num_dimensions(self) -> Tensor:
        return _num_dimensions(self._num.flatten(), self.loc.shape[-1], self.num_coordinates)

    def like(self, loc: Tensor, std: Tensor) -> "PointCloudGaussian":
        return PointCloudGaussian(loc, std, self.full, self.num_coordinates)

    def rsample(self, noise: Generators = None) -> Tensor:
        offset = self.std * randn_like(self.loc, noise)
        return self.loc + self._projected(offset)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        offset, dimensions = tensor_of(state) - self.loc, self.num_dimensions.to(self.loc)
        if self.std.dim() == 0 or self.std.shape[1:].numel() == 1:
            # All stds of a sample are equal: the density is the usual one of what exists.
            rate, peak = (values.flatten().to(offset) for values in density_of(self.std))
            squares = self._projected(offset).square().sum(dim=(1, 2))
            values = dimensions * peak - 0.5 * rate.square() * squares
            return values if reduction == "sum" else values / dimensions.clamp(min=1)
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
    return (like != 0).any(dim=-1, keepdim=True)


def _project(x: Tensor, full: Tensor, num_coordinates: int, num: Tensor | None = None) -> Tensor:
    """Project states; `num` is how many points each has, [B, 1, 1]."""
    num = full.sum(dim=1, keepdim=True) if num is None else num
    empty = ~full
    kept = x.masked_fill(empty, 0)
    coordinates = kept[..., :num_coordinates]
    mean = coordinates.sum(dim=1, keepdim=True) / num.clamp(min=1)
    centred = (coordinates - mean).masked_fill(empty, 0)
    if num_coordinates >= x.shape[-1]:
        return centred
    return torch.cat([centred, kept[..., num_coordinates:]], dim=-1)


def _num_dimensions(num: Tensor, num_channels: int, num_coordinates: int) -> Tensor:
    """Return how many numbers are free of so many points [B], float64."""
    num = num.double()
    return num * num_channels - num_coordinates * num.clamp(max=1)


def _positive(total: Tensor) -> Tensor:
    """Return sums of weights; where there are none, 1."""
    return total.where(total > 0, 1)
