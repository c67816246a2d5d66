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

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = [
    "Given",
    "Kernel",
    "frechet_distance",
    "gaussian",
    "kernel_distance",
    "median_distance",
    "mmd",
    "neighbour_distances",
    "polynomial",
    "precision_recall",
    "similarity",
]

_CHUNK = 4096  # rows of a distance matrix at a time

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
        real_similarity: `similarity` of the real points, where it is known.
    """
    if min(len(real), len(generated)) < 2:
        return float("nan")
    if kernel is None:
        kernel = gaussian(median_distance(real))
    if real_similarity is None:
        real_similarity = similarity(real, kernel)
    across = float(kernel(real.double(), generated.double()).mean())
    return real_similarity + similarity(generated, kernel) - 2 * across


def similarity(points: Tensor, kernel: Kernel) -> float:
    """Return the mean kernel of every two different points of [n, d], n at least 2."""
    points = points.double()
    values = kernel(points, points)
    return float((values.sum() - values.diagonal().sum()) / (len(points) * (len(points) - 1)))


def gaussian(*bandwidths: float) -> Kernel:
    r"""Return :math:`\frac{1}{B} \sum_h \exp(-\|x - y\|^2 / 2 h^2)`, for low dimensions."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = _distances(x, y).square()
        return torch.stack([torch.exp(squares / (-2 * h**2)) for h in bandwidths]).mean(dim=0)

    return kernel


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel, (x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def median_distance(points: Tensor, max_points: int = 2000) -> float:
    """Return the median distance of every two of the first points [n, d]."""
    return float(torch.pdist(points[:max_points].double()).median())


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    r"""Return the Fréchet distance of Gaussians fitted to points [n, D] and [m, D], in float64.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})

    It falls with the number of points: compare sets of equal size. NaN for fewer than two.
    """
    if min(len(generated), len(real)) < 2:
        return float("nan")
    a, b = generated.double(), real.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


class Given(nn.Module):
    """Hands features on as they are: torchmetrics' "network" for features that are known.

    Args:
        num_features: Length of a vector.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Return torchmetrics' KID of features [n, D] and [m, D]: mean and deviation over subsets.

    The unbiased squared MMD under (x.y / D + 1)^3, averaged over random subsets; its expectation
    does not depend on their size. NaN for fewer than two samples.

    Args:
        real: Features.
        generated: Features.
        subset_size: Vectors in a subset, at most as many as there are.
        num_subsets: Subsets; one where it holds every vector of both sets.
        seed: Seed of the subsets.
    """
    smaller = min(len(real), len(generated))
    if smaller < 2:
        return float("nan"), float("nan")
    subset_size = min(subset_size, smaller)
    if subset_size == max(len(real), len(generated)):
        num_subsets = 1
    from torchmetrics.image.kid import KernelInceptionDistance  # slow to import

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            Given(real.shape[1]), subsets=num_subsets, subset_size=subset_size
        )
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


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
        radii: `neighbour_distances` of the real features, where they are known.
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
        distances = _distances(part, generated)
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
        _distances(part, points).kthvalue(num_neighbours + 1, dim=1).values
        for part in points.split(_CHUNK)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(parts)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by a matrix product, which makes equal points differ.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
