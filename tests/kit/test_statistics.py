"""MMD: closed forms, the slow estimate, its default bandwidth."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_rlft.kit.statistics import gaussian, median_distance, mmd, polynomial, similarity


def normal(num: int, dims: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(num, dims, generator=generator, dtype=torch.float64)


def test_mmd_of_known_gaussians() -> None:
    # E k(x, y) = (h^2 / (h^2 + 2 s^2))^(d/2) exp(-|mu|^2 / (2 (h^2 + 2 s^2))) for equal s.
    dims, shift, h = 2, 1.5, 1.5
    factor = (h**2 / (h**2 + 2)) ** (dims / 2)
    expected = 2 * factor * (1 - math.exp(-dims * shift**2 / (2 * (h**2 + 2))))
    pairs = [(normal(400, dims, 2 * i), normal(400, dims, 2 * i + 1, shift)) for i in range(40)]
    assert np.mean([mmd(a, b, gaussian(h)) for a, b in pairs]) == pytest.approx(expected, rel=0.04)
    a, b = pairs[0]
    assert mmd(a, b, gaussian(h, h)) == pytest.approx(mmd(a, b, gaussian(h)))
    both = (mmd(a, b, gaussian(0.5)) + mmd(a, b, gaussian(2.0))) / 2
    assert mmd(a, b, gaussian(0.5, 2.0)) == pytest.approx(both)


def test_mmd_is_unbiased() -> None:
    # The slow estimate, pair by pair; and 0 on average for equal laws, often below.
    a, b = normal(12, 2, 0), normal(9, 2, 1)
    k = [[math.exp(-(math.dist(x, y) ** 2) / 2) for y in b.tolist()] for x in a.tolist()]
    aa = [math.exp(-(math.dist(x, y) ** 2) / 2) for x in a.tolist() for y in a.tolist() if x != y]
    bb = [math.exp(-(math.dist(x, y) ** 2) / 2) for x in b.tolist() for y in b.tolist() if x != y]
    expected = np.mean(aa) + np.mean(bb) - 2 * np.mean(k)
    assert mmd(a, b, gaussian(1.0)) == pytest.approx(expected)
    values = [
        mmd(normal(30, 2, 2 * i), normal(30, 2, 2 * i + 1), gaussian(1.0)) for i in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert np.mean(np.array(values) < 0) > 0.3
    assert math.isnan(mmd(a[:1], b))


def test_the_median_is_the_default_bandwidth() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    assert median_distance(points) == 5
    a, b = normal(50, 3, 0), normal(50, 3, 1, 0.5)
    assert mmd(a, b) == mmd(a, b, gaussian(median_distance(a)))


def test_the_polynomial_kernel_is_the_slow_one_and_similarities_are_kept() -> None:
    a, b = normal(9, 5, 0), normal(7, 5, 1, 0.5)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return float(np.mean([(float(x @ y) / 5 + 1) ** 3 for x, y in pairs]))

    within = [[(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j] for s in (a, b)]
    expected = sum(map(mean, within)) - 2 * mean([(x, y) for x in a for y in b])
    assert mmd(a, b, polynomial) == pytest.approx(expected)
    assert similarity(a, polynomial) == pytest.approx(mean(within[0]))
    assert mmd(a, b, polynomial, similarity(a, polynomial)) == mmd(a, b, polynomial)
    assert mmd(a, b, polynomial, 0.0) == pytest.approx(expected - mean(within[0]))
