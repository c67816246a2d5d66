"""Distances without some samples: as computed anew, from the samples that are left."""

import pytest
import torch
from torch import Tensor

from lit_rlft.core.reward import LeftOut
from lit_rlft.kit.leave_out import frechet_left_out, mmd_left_out, precision_recall_left_out
from lit_rlft.kit.statistics import (
    FittedGaussian,
    Kernel,
    frechet_distance,
    gaussian,
    mmd,
    neighbour_distances,
    polynomial,
    precision_recall,
    similarity,
)
from tests.kit.test_statistics import normal

PAIRS = torch.tensor([[0, 1], [5, 2], [3, 7], [7, 6]])


def without(points: Tensor, rows: list[int]) -> Tensor:
    stays = torch.ones(len(points), dtype=torch.bool)
    stays[rows] = False
    return points[stays]


def subsets(points: Tensor) -> list[Tensor]:
    """Return the points without each, then without each of the pairs."""
    rows = [[i] for i in range(len(points))] + PAIRS.tolist()
    return [without(points, left_out) for left_out in rows]


def joined(found: LeftOut) -> list[float]:
    return torch.cat(found).tolist()


@pytest.mark.parametrize("num", [8, 20, 21, 22, 60])
@pytest.mark.parametrize("kind", ["normal", "repeated", "flat"])
def test_frechet_distances(num: int, kind: str) -> None:
    # Fewer points than the 20 dimensions, as many, and more.
    points, real = normal(num, 20, 0, 0.3), normal(70, 20, 1) @ normal(20, 20, 2)
    if kind == "repeated":
        points[1] = points[0]
        points[4:7] = points[3]
    if kind == "flat":
        points[:, :12] = points[:, 12:15].repeat(1, 4)
        real = normal(14, 20, 1)
    found = joined(frechet_left_out(points, FittedGaussian.of(real), PAIRS))
    expected = [frechet_distance(part, real) for part in subsets(points)]
    assert found == pytest.approx(expected, rel=1e-6, abs=2e-5)


def test_frechet_distances_of_points_that_are_all_the_same() -> None:
    points, real = torch.ones(6, 3), normal(50, 3, 1)
    found = frechet_left_out(points, FittedGaussian.of(real), PAIRS[:2])
    expected = float((real.mean(0) - 1).square().sum() + real.T.cov().trace())
    assert joined(found) == pytest.approx([expected] * 8)
    single = frechet_left_out(points, FittedGaussian.of(real[:1]), PAIRS[:2])
    assert torch.cat(single).isnan().all()


@pytest.mark.parametrize("kernel", [polynomial, gaussian(0.7)])
def test_maximum_mean_discrepancies(kernel: Kernel) -> None:
    points, real = normal(9, 4, 0, 0.5), normal(12, 4, 1)
    found = mmd_left_out(real, points, kernel, similarity(real, kernel), PAIRS)
    expected = [mmd(real, part, kernel) for part in subsets(points)]
    assert joined(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall(k: int) -> None:
    points, real = normal(30, 2, 0, 1.5), normal(50, 2, 1)
    points[8] = points[7]
    found = precision_recall_left_out(real, points, PAIRS, k, neighbour_distances(real, k))
    expected = [precision_recall(real, part, k) for part in subsets(points)]
    precision, recall = zip(*expected, strict=True)
    assert joined(found[0]) == pytest.approx(precision) and len({*precision}) > 1
    assert joined(found[1]) == pytest.approx(recall) and len({*recall}) > 2
