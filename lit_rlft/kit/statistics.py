r"""Maximum mean discrepancy: whether two sets of points have the same law.

.. math:: E\, k(x, x') + E\, k(y, y') - 2 E\, k(x, y)

over pairs of different points, which is unbiased: it may be negative, and is 0 on average for equal
laws.

References:
    A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a
    Demystifying MMD GANs (Binkowski et al., 2018; the polynomial kernel, KID),
    https://arxiv.org/abs/1801.01401
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Kernel", "gaussian", "median_distance", "mmd", "polynomial", "similarity"]

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
        # Not by a matrix product, which makes equal points differ.
        squares = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.stack([torch.exp(squares / (-2 * h**2)) for h in bandwidths]).mean(dim=0)

    return kernel


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel, (x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def median_distance(points: Tensor, max_points: int = 2000) -> float:
    """Return the median distance of every two of the first points [n, d]."""
    return float(torch.pdist(points[:max_points].double()).median())
