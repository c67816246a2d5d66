"""Distances between two sets of feature vectors.

FID and KID are torchmetrics'; the rest is here.

References:
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et
    al., 2017; FID), https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs (Binkowski et al., 2018; KID), https://arxiv.org/abs/1801.01401
    Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al.,
    2019), https://arxiv.org/abs/1904.06991
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

__all__ = [
    "Given",
    "frechet_distance",
    "kernel_distance",
    "neighbour_distances",
    "precision_recall",
]

_CHUNK = 4096  # rows of a distance matrix at a time


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


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    r"""Return torchmetrics' FID of features [n, D] and [m, D], in double precision.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})

    It falls with the number of samples: compare what has the same. NaN for fewer than two.
    """
    if min(len(real), len(generated)) < 2:
        return float("nan")
    metric = FrechetInceptionDistance(Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


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
