r"""Distances between two sets of points: MMD, the Fréchet distance, KID, precision and recall.

The unbiased estimate of the squared maximum mean discrepancy is

.. math:: E\, k(x, x') + E\, k(y, y') - 2 E\, k(x, y)

over pairs of different points. It may be negative, and is 0 on average for equal distributions.

References:
    A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et
    al., 2017; the Fréchet distance, FID), https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs (Binkowski et al., 2018; the polynomial kernel, KID),
    https://arxiv.org/abs/1801.01401
    Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al.,
    2019), https://arxiv.org/abs/1904.06991
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FittedGaussian",
    "Kernel",
    "frechet_distance",
    "gaussian",
    "kernel_distance",
    "mean_kernels",
    "median_distance",
    "mmd",
    "neighbour_distances",
    "point_distances",
    "polynomial",
    "precision_recall",
    "similarity",
]

_CHUNK = 1024  # rows of a matrix of pairs at a time
_FEW_DIMENSIONS = 64  # up to these distances are not computed by a matrix product

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Of points [n, d] and [m, d], float64; returns [n, m]."""


def mmd(
    real: Tensor,
    generated: Tensor,
    kernel: Kernel | None = None,
    real_similarity: float | None = None,
) -> float:
    """Return the unbiased squared MMD of points [n, d] and [m, d], NaN for fewer than two.

    Args:
        real: Points.
        generated: Points.
        kernel: k; unless given Gaussian with the median distance of the real points. Fix it where
            several sets are compared.
        real_similarity: `similarity` of the real points, where already computed.
    """
    if min(len(real), len(generated)) < 2:
        return float("nan")
    if kernel is None:
        kernel = gaussian(median_distance(real))
    if real_similarity is None:
        real_similarity = similarity(real, kernel)
    across = float(mean_kernels(generated, real, kernel).mean())
    return real_similarity + similarity(generated, kernel) - 2 * across


def similarity(points: Tensor, kernel: Kernel) -> float:
    """Return the mean kernel of every two different points of [n, d], n at least 2."""
    return float(mean_kernels(points, None, kernel).mean())


def mean_kernels(points: Tensor, others: Tensor | None, kernel: Kernel) -> Tensor:
    """Return each point's mean kernel with all others, float64 [n].

    Args:
        points: [n, d].
        others: [m, d]; None for the other ones of the points themselves, n at least 2.
        kernel: k.
    """
    if others is not None:
        others = others.double()
        return torch.cat([kernel(part, others).mean(dim=1) for _, part in _chunks(points)])
    sums = [values.sum(dim=1) for values in _own_pairs(points, kernel)]
    return torch.cat(sums) / (len(points) - 1)


def _own_pairs(points: Tensor, kernel: Kernel) -> Iterator[Tensor]:
    """Yield rows of the kernel of every two points, 0 where these are one and the same."""
    everything = points.double()
    for start, part in _chunks(points):
        values = kernel(part, everything)
        values[:, start:].fill_diagonal_(0)
        yield values


def _chunks(points: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield some points at a time as float64, and the first one's place."""
    for start in range(0, len(points), _CHUNK):
        yield start, points[start : start + _CHUNK].double()


def gaussian(*bandwidths: float) -> Kernel:
    r"""Return :math:`\frac{1}{B} \sum_h \exp(-\|x - y\|^2 / 2 h^2)`, for low dimensions."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = point_distances(x, y).square()
        return torch.stack([torch.exp(squares / (-2 * h**2)) for h in bandwidths]).mean(dim=0)

    return kernel


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel, (x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def median_distance(points: Tensor) -> float:
    """Return the median distance of every two of the first 2,000 points [n, d]."""
    return float(torch.pdist(points[:2000].double()).median())


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    r"""Return the Fréchet distance of Gaussians fitted to points [n, D] and [m, D], in float64.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})

    It falls with the number of points: compare sets of equal size. NaN for fewer than two.
    """
    return FittedGaussian.of(real).frechet_distance(generated)


@dataclass(frozen=True)
class FittedGaussian:
    """A Gaussian fitted to points, kept where several sets are compared with these.

    Attributes:
        mean: [D].
        root: Root of the covariance, [D, D]; NaN for fewer than two points.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, points: Tensor) -> "FittedGaussian":
        """Fit to points [n, D]."""
        points = points.double()
        mean, size = points.mean(dim=0), points.shape[1]
        if len(points) < 2:
            return cls(mean, points.new_full((size, size), torch.nan))
        return cls.of_moments(mean, points.T.cov())

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor) -> "FittedGaussian":
        """Take a mean [D] and a covariance [D, D], float64; what rounding put below 0 is 0."""
        values, vectors = torch.linalg.eigh(covariance)
        return cls(mean, (vectors * values.clamp(min=0).sqrt()) @ vectors.T)

    def frechet_distance(self, generated: Tensor) -> float:
        """Return that of points [n, D], NaN for fewer than two."""
        num = len(generated)
        if num < 2 or self.root.isnan().any():
            return float("nan")
        centred = generated.double()
        mean = centred.mean(dim=0)
        centred = centred - mean
        seen = centred @ self.root
        # Of both products, which have the same values but for zeros, the smaller one.
        product = seen @ seen.T if num < seen.shape[1] else seen.T @ seen
        roots = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + self.root.square().sum()
        distance += centred.square().sum() / (num - 1) - 2 * roots / (num - 1) ** 0.5
        return float(distance)


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float]:
    r"""Return KID of features [n, D] and [m, D], of every pair, and its standard error.

    The unbiased squared MMD under (x.y / D + 1)^3. With
    :math:`h_{ij} = k(x_i, x_j) - a_i - a_j`, :math:`a_i = E_y k(x_i, y)`, it is a constant of the
    real features plus the mean of h over pairs of different generated ones, whose variance is

    .. math:: \frac{4}{m} \sigma_g^2 + \frac{2}{m (m - 1)} \sigma_q^2,

    h being the sum of its mean, of effects :math:`g_i + g_j` of both and of a rest
    :math:`q_{ij}`. The real features are taken as they are. NaN for fewer than two features, and
    the error for fewer than four.

    References:
        A Class of Statistics with Asymptotically Normal Distribution (Hoeffding, 1948),
        https://doi.org/10.1214/aoms/1177730196
    """
    m = len(generated)
    if min(len(real), m) < 2:
        return float("nan"), float("nan")
    across = mean_kernels(generated, real, polynomial)
    sums, squares, start = [], 0.0, 0
    for values in _own_pairs(generated, polynomial):
        values -= across[start : start + len(values), None] + across
        values[:, start:].fill_diagonal_(0)
        sums.append(values.sum(dim=1))
        squares += float(values.square().sum())
        start += len(values)
    means = torch.cat(sums) / (m - 1)
    kid = similarity(real, polynomial) + float(means.mean())
    if m < 4:
        return kid, float("nan")
    # The effects by least squares, then the rest with its degrees of freedom.
    effects = (means - means.mean()) * (m - 1) / (m - 2)
    explained = m * (m - 1) * means.mean().square() + 2 * (m - 2) * effects.square().sum()
    rest = (squares - explained) / (m * (m - 3))
    main = effects.var() - rest / (m - 2)
    # A noisy main part may be negative; half of the uncorrected error is the least.
    variance = torch.maximum(4 * main / m + 2 * rest / (m * (m - 1)), effects.var() / m)
    return kid, float(variance.sqrt())


def precision_recall(
    real: Tensor, generated: Tensor, num_neighbours: int = 3, radii: Tensor | None = None
) -> tuple[float, float]:
    """Return improved precision and recall of features [n, D] and [m, D], in [0, 1].

    Precision is the share of generated vectors that lie within some real vector's distance to its
    k-th nearest other real one; recall the same with the roles exchanged. NaN where a set has no
    more than k vectors.

    Args:
        real: Features.
        generated: Features.
        num_neighbours: k; the paper takes 3.
        radii: `neighbour_distances` of the real features, where already computed.
    """
    if min(len(real), len(generated)) <= num_neighbours:
        return float("nan"), float("nan")
    real, generated = real.double(), generated.double()
    if radii is None:
        radii = neighbour_distances(real, num_neighbours)
    own = neighbour_distances(generated, num_neighbours)
    near_real = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    near_generated = []
    for part, limits in zip(real.split(_CHUNK), radii.split(_CHUNK), strict=True):  # type: ignore[no-untyped-call]
        distances = point_distances(part, generated)
        near_real |= (distances <= limits.unsqueeze(1)).any(dim=0)
        near_generated.append((distances <= own).any(dim=1))
    precision, recall = (x.double().mean() for x in (near_real, torch.cat(near_generated)))
    return float(precision), float(recall)


def neighbour_distances(points: Tensor, num_neighbours: int) -> Tensor:
    """Return the distance of each point [n, D] to its k-th nearest other one, [n].

    NaN where there are no more than k.
    """
    if len(points) <= num_neighbours:
        return points.new_full((len(points),), torch.nan)
    # The nearest point of all is the point itself, at distance 0.
    parts = [
        point_distances(part, points).kthvalue(num_neighbours + 1, dim=1).values
        for part in points.split(_CHUNK)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(parts)


def point_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance of every point [n, D] from every one [m, D], exactly 0 for equal ones."""
    exact = "donot_use_mm_for_euclid_dist"
    if x.shape[1] <= _FEW_DIMENSIONS:
        return torch.cdist(x, y, compute_mode=exact)
    # A matrix product is far faster, but makes equal points differ: those near are done anew.
    sizes = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    squares = torch.addmm(sizes, x, y.T, alpha=-2)
    rows, columns = (squares < 1e-6 * sizes).nonzero(as_tuple=True)
    if len(rows) * x.shape[1] > 4 * squares.numel():
        return torch.cdist(x, y, compute_mode=exact)
    squares[rows, columns] = (x[rows] - y[columns]).square().sum(dim=1)
    return squares.sqrt()
