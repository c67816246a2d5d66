r"""Distances of sets when one or two of the samples are left out, without computing them anew.

The jackknife needs the Fréchet distance of n sets of n - 1 points. One decomposition gives all of
them: with the scatter matrix M of the points, seen through the root of the other set's covariance,
and the vectors U of those left out,

.. math:: \mathrm{tr} \sqrt{M} - \mathrm{tr} \sqrt{M - U^T W U}
    = - \frac{1}{\pi} \int_0^\infty \log \det(1 - W U (M + t^2)^{-1} U^T)\, dt,

W being 1 plus a constant for the shift of the mean. It follows from
:math:`\sqrt{a} = \frac{2}{\pi} \int_0^\infty \frac{a}{a + t^2} dt` by parts. On a logarithmic grid
the sum of few terms converges exponentially. It holds where M is singular, with fewer points than
dimensions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlft.core.reward import LeftOut
from lit_rlft.kit.statistics import FittedGaussian, Kernel, mean_kernels, point_distances

__all__ = ["frechet_left_out", "mmd_left_out", "precision_recall_left_out"]

_STEP = 0.5  # of the logarithmic grid; the error is exp(-pi^2 / step)
_CHUNK = 1024  # rows at a time
_BLOCK = 32  # pairs whose kernel is taken from the diagonal of a matrix


def frechet_left_out(generated: Tensor, real: FittedGaussian, pairs: Tensor) -> LeftOut:
    """Return the Fréchet distance without each of the points [n, D], and without each pair.

    Args:
        generated: Points [n, D], n at least 4.
        real: The Gaussian they are compared with.
        pairs: Places of the points of each pair, [P, 2].
    """
    points = generated.double()
    num, mean = len(points), points.mean(dim=0)
    if real.root.isnan().any():
        return LeftOut(
            points.new_full((num,), torch.nan), points.new_full((len(pairs),), torch.nan)
        )
    centred = points - mean
    spectrum = _Spectrum.of(centred @ real.root)
    shift, total = mean - real.mean, centred.square().sum()

    def without(rows: Tensor) -> Tensor:
        left = num - rows.shape[1]
        vectors = centred[rows]
        offset = vectors.sum(dim=1) / left
        means = (shift - offset).square().sum(dim=1)
        traces = total - vectors.square().sum(dim=(1, 2)) - left * offset.square().sum(dim=1)
        roots = spectrum.root_without(rows)
        return means + traces / (left - 1) - 2 * roots / math.sqrt(left - 1)

    def all_of(places: Tensor) -> Tensor:
        return real.root.square().sum() + torch.cat([without(rows) for rows in _parts(places)])

    return LeftOut(all_of(torch.arange(num).unsqueeze(1)), all_of(pairs))


@dataclass(frozen=True)
class _Spectrum:
    """Singular value decomposition of centred points [n, D].

    Attributes:
        vectors: Left singular vectors, [n, r].
        squares: Squared singular values, [r], none 0.
    """

    vectors: Tensor
    squares: Tensor

    @classmethod
    def of(cls, centred: Tensor) -> "_Spectrum":
        num, dims = centred.shape
        if num <= dims:
            squares, vectors = torch.linalg.eigh(centred @ centred.T)
            squares, vectors = squares[1:], vectors[:, 1:]  # the first is that of the mean, 0
        else:
            squares, axes = torch.linalg.eigh(centred.T @ centred)
            vectors = centred @ axes / squares.clamp(min=0).sqrt()
        known = squares > 4 * max(num, dims) * torch.finfo(squares.dtype).eps * squares[-1]
        return cls(vectors[:, known], squares[known])

    def root_without(self, rows: Tensor) -> Tensor:
        """Return the trace of the root of the scatter matrix without some points.

        Args:
            rows: The k points that are left out each time, [B, k].
        """
        num, k = len(self.vectors), rows.shape[1]
        whole = self.squares.sqrt().sum()
        if not len(self.squares):
            return whole.expand(len(rows))
        nodes, weights = self._grid()
        one = torch.eye(k, dtype=nodes.dtype)
        root = one + (math.sqrt(1 + k / (num - k)) - 1) / k  # of W
        own = self.vectors[rows]  # [B, k, r]
        rest = torch.zeros(len(rows), k, k, dtype=nodes.dtype)
        if len(self.squares) < num - 1:  # otherwise each point takes its own dimension away: 0
            values, axes = torch.linalg.eigh(one - root @ (own @ own.mT) @ root)
            rest = (axes * values.clamp(min=0).unsqueeze(1)) @ axes.mT
        # 1 - W U (M + t^2)^-1 U', written so that nothing cancels where t is small.
        inverse = 1 / (self.squares.unsqueeze(1) + nodes.square())
        products = [(own[:, i] * own[:, j]) @ inverse for i in range(k) for j in range(k)]
        inner = torch.stack(products, dim=-1)
        inner = inner.view(*inner.shape[:2], k, k)  # [B, T, k, k]
        matrices = rest.unsqueeze(1) + nodes.square()[:, None, None] * (root @ inner @ root)
        logs = torch.linalg.det(matrices).clamp(min=torch.finfo(nodes.dtype).tiny).log()
        return whole + logs @ weights / math.pi

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return values of t and their weights, [T] each."""
        low, high = 1e-8 * self.squares.min().sqrt(), 1e3 * self.squares.max().sqrt()
        nodes = torch.arange(math.log(low), math.log(high), _STEP, dtype=low.dtype).exp()
        weights = _STEP * nodes
        weights[[0, -1]] /= 1 - math.exp(-_STEP)  # beyond both ends it falls as a geometric series
        return nodes, weights


def mmd_left_out(
    real: Tensor, generated: Tensor, kernel: Kernel, real_similarity: float, pairs: Tensor
) -> LeftOut:
    """Return the unbiased squared MMD without each generated point, and without each pair.

    Args:
        real: Points [m, d].
        generated: Points [n, d], n at least 4.
        kernel: k.
        real_similarity: `similarity` of the real points.
        pairs: Places of the points of each pair, [P, 2].
    """
    num = len(generated)
    own = mean_kernels(generated, None, kernel) * (num - 1)
    across = mean_kernels(generated, real, kernel)

    def value(sums: Tensor, crossings: Tensor, left: int) -> Tensor:
        return real_similarity + sums / (left * (left - 1)) - 2 * crossings / left

    each = value(own.sum() - 2 * own, across.sum() - across, num - 1)
    first, second = pairs.unbind(dim=1)
    points = generated.double()
    between = [
        kernel(points[part[:, 0]], points[part[:, 1]]).diagonal()
        for part in pairs.split(_BLOCK)  # type: ignore[no-untyped-call]
    ]
    sums = own.sum() - 2 * (own[first] + own[second]) + 2 * torch.cat(between)
    both = value(sums, across.sum() - across[first] - across[second], num - 2)
    return LeftOut(each, both)


def precision_recall_left_out(
    real: Tensor, generated: Tensor, pairs: Tensor, num_neighbours: int, radii: Tensor
) -> tuple[LeftOut, LeftOut]:
    """Return precision and recall without each generated vector, and without each pair.

    Args:
        real: Features [m, D].
        generated: Features [n, D], n at least k + 3.
        pairs: Places of the vectors of each pair, [P, 2].
        num_neighbours: k.
        radii: `neighbour_distances` of the real features.
    """
    generated, num = generated.double(), len(generated)
    balls = _Balls.of(generated, num_neighbours)
    singles = torch.arange(num).unsqueeze(1).expand(-1, 2)
    left_out = torch.cat([singles, pairs])
    near_real = torch.zeros(num, dtype=torch.bool)
    missed = torch.zeros(len(left_out), dtype=torch.float64)
    for places in _parts(torch.arange(len(real))):
        distances = point_distances(real[places].double(), generated)
        near_real |= (distances <= radii[places].unsqueeze(1)).any(dim=0)
        missed += balls.missed(distances, left_out)
    share, inside = 1 - missed / len(real), near_real.double()
    first, second = pairs.unbind(dim=1)
    each = (inside.sum() - inside) / (num - 1)
    both = (inside.sum() - inside[first] - inside[second]) / (num - 2)
    return LeftOut(each, both), LeftOut(share[:num], share[num:])


@dataclass(frozen=True)
class _Balls:
    """The ball around each of n vectors that reaches its k-th nearest other one.

    Attributes:
        nearest: The k + 2 nearest others of each, [n, k + 2].
        distances: How far these are, [n, k + 2], rising.
        k: Which of them is on the ball's edge, from 1.
        followers: Of each vector, those that have it among their k nearest.
    """

    nearest: Tensor
    distances: Tensor
    k: int
    followers: list[Tensor]

    @classmethod
    def of(cls, vectors: Tensor, k: int) -> "_Balls":
        parts = []
        for places in _parts(torch.arange(len(vectors))):
            distances = point_distances(vectors[places], vectors)
            distances[torch.arange(len(places)), places] = torch.inf
            parts.append(distances.topk(k + 2, dim=1, largest=False, sorted=True))
        distances, nearest = (torch.cat(x) for x in zip(*parts, strict=True))
        order = nearest[:, :k].flatten().argsort(stable=True)
        counts = nearest[:, :k].flatten().bincount(minlength=len(vectors))
        followers = (order // k).split(counts.tolist())  # type: ignore[no-untyped-call]
        return cls(nearest, distances, k, list(followers))

    def missed(self, distances: Tensor, left_out: Tensor) -> Tensor:
        """Return how many points are in no ball when two vectors, or one twice, are left out, [N].

        Args:
            distances: Of points from the vectors, [m, n].
            left_out: [N, 2].
        """
        inside = distances <= self.distances[:, self.k - 1]
        counts = inside.sum(dim=1)
        rare = counts <= 2  # others stay in some ball
        inside, counts, distances = inside[rare], counts[rare], distances[rare]
        found = []
        for i, j in left_out.tolist():
            lost = inside[:, i].long() if i == j else inside[:, i].long() + inside[:, j]
            bare = counts == lost
            rows = torch.cat([self.followers[i], self.followers[j]])
            rows = rows[(rows != i) & (rows != j)]
            # Their balls grow to the nearest that are left.
            stays = (self.nearest[rows] != i) & (self.nearest[rows] != j)
            edge = (stays.cumsum(dim=1) == self.k).int().argmax(dim=1, keepdim=True)
            radii = self.distances[rows].gather(1, edge).squeeze(1)
            reached = (distances[bare][:, rows] <= radii).any(dim=1)
            found.append(len(reached) - int(reached.sum()))
        return torch.tensor(found, dtype=torch.float64)


def _parts(places: Tensor) -> Iterator[Tensor]:
    """Yield some rows at a time, which bounds the memory."""
    for start in range(0, len(places), _CHUNK):
        yield places[start : start + _CHUNK]
