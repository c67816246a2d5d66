"""Distances of sets: closed forms, slow versions, scipy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.image.metrics import SetDistances as ImageDistances
from domains.image.sources import Arrays
from domains.layout.metrics import SetDistances as LayoutDistances
from domains.layout.sources import JSONLayouts
from domains.molecule.metrics import Novelty
from domains.molecule.metrics import SetDistances as MoleculeDistances
from domains.molecule.sources import MoleculeFile
from lit_rlft.core.checks import BadArgument
from lit_rlft.core.reward import Metric
from lit_rlft.kit import statistics
from lit_rlft.kit.statistics import (
    frechet_distance,
    gaussian,
    kernel_distance,
    mmd,
    point_distances,
    polynomial,
    precision_recall,
)


def normal(num: int, dims: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(num, dims, generator=generator, dtype=torch.float64)


def test_frechet_distance_is_scipys() -> None:
    a, b = normal(200, 6, 0), normal(150, 6, 1, 0.3, 1.5) @ normal(6, 6, 2)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected += np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert math.isnan(frechet_distance(a[:1], b))


def test_frechet_distance_of_known_gaussians() -> None:
    # |mu|^2 + d (s - 1)^2 for N(0, I) and N(mu, s^2 I).
    a, b = normal(40000, 3, 0), normal(40000, 3, 1, 0.5, 2.0)
    assert frechet_distance(a, b) == pytest.approx(3 * 0.25 + 3, rel=0.03)


def slow_kid(a: Tensor, b: Tensor) -> float:
    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    within = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


class Given(nn.Module):
    """torchmetrics' network for features that are already computed."""

    num_features = 4

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_kernel_distance_is_the_slow_one_and_the_mean_over_subsets() -> None:
    a, b = normal(60, 4, 0), normal(40, 4, 1, 0.5)
    assert kernel_distance(a, b)[0] == pytest.approx(slow_kid(a, b), rel=1e-9)
    assert mmd(a, b, polynomial) == pytest.approx(slow_kid(a, b), rel=1e-9)
    assert math.isnan(mmd(a[:1], b, polynomial))
    assert all(math.isnan(value) for value in kernel_distance(a[:1], b))
    assert math.isfinite(kernel_distance(a, b[:3])[0]) and math.isnan(kernel_distance(a, b[:3])[1])
    subsets = KernelInceptionDistance(Given(), subsets=300, subset_size=20)
    for features, real in ((a, True), (b, False)):
        subsets.update(features, real=real)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, deviation = subsets.compute()
    assert float(mean) == pytest.approx(slow_kid(a, b), abs=4 * float(deviation) / 300**0.5)
    whole = KernelInceptionDistance(Given(), subsets=1, subset_size=40)
    whole.update(a[:40], real=True)
    whole.update(b, real=False)
    assert kernel_distance(a[:40], b)[0] == pytest.approx(float(whole.compute()[0]), rel=1e-5)


def test_kernels_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(60, 4, 0), normal(40, 4, 1, 0.5)

    def found() -> list[float]:
        return [*kernel_distance(a, b), mmd(a, b, gaussian(0.5)), *precision_recall(a, b)]

    whole = found()
    monkeypatch.setattr(statistics, "_CHUNK", 7)
    assert found() == pytest.approx(whole)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_of_the_kernel_distance_by_repeated_sampling(shift: float) -> None:
    # Without a shift pairs of samples make the most of it, with one single samples do.
    real, repeats = normal(500, 4, 0), 400
    found = [kernel_distance(real, normal(30, 4, 1 + i, shift)) for i in range(repeats)]
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(dim=1)
    # Three times the deviation's own error, 1 / sqrt(2 repeats) of normal and 1.4 of it of others.
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("seed", "spread"), [(1, 0.3), (1, 3.0), (7, 1.0)])
def test_the_error_of_the_kernel_distance_is_that_of_its_parts(seed: int, spread: float) -> None:
    """The effects by least squares over all pairs; of seed 7 the variance would be negative."""
    real, generated = normal(20, 2, 0), normal(9, 2, seed, 0.0, spread)
    m = len(generated)
    pairs = [(i, j) for i in range(m) for j in range(i)]
    across = [float(np.mean([(float(x @ y) / 2 + 1) ** 3 for y in real])) for x in generated]
    h = [float(generated[i] @ generated[j] / 2 + 1) ** 3 - across[i] - across[j] for i, j in pairs]
    design = np.array([[float(k in pair) for k in range(m)] for pair in pairs])
    # The effects' own mean is half of that of h.
    effects, (rest,), *_ = np.linalg.lstsq(design, np.array(h), rcond=None)
    of_pairs = rest / (len(pairs) - m)
    of_one = effects.var(ddof=1) - of_pairs / (m - 2)
    variance = 4 * of_one / m + 2 * of_pairs / (m * (m - 1))
    variance = max(variance, effects.var(ddof=1) / m)
    assert kernel_distance(real, generated)[1] == pytest.approx(variance**0.5, rel=1e-9)


@pytest.mark.parametrize("copies", [3, 40])
def test_distances_in_many_dimensions_are_exact_for_equal_and_near_points(copies: int) -> None:
    a, b = normal(50, 100, 0, 5.0), normal(60, 100, 1, 5.0)
    b[:copies] = a[0]
    b[copies] = a[1] + 1e-5
    found = point_distances(a, b)
    slow = (a.unsqueeze(1) - b).square().sum(dim=2).sqrt()
    torch.testing.assert_close(found, slow, rtol=1e-7, atol=0)
    assert not found[0, :copies].any()


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0]])
    # With k = 1 the radii are 1, 1 and 2: the balls cover [-1, 2] and [1, 5].
    generated = torch.tensor([[-0.5], [4.9], [5.1], [20.0]])
    # Its own radii are 5.4, 0.2, 0.2 and 14.9: the first ball covers [-5.9, 4.9].
    assert precision_recall(real, generated, 1) == (0.5, 1.0)
    # Balls have their edges: that of 3 reaches 5, and that of 5 reaches 3.
    assert precision_recall(real, torch.tensor([[5.0], [7.0]]), 1) == (0.5, pytest.approx(1 / 3))
    far = torch.tensor([[100.0], [101.0]])
    assert precision_recall(real, far, 1) == (0.0, 0.0)
    assert all(math.isnan(value) for value in precision_recall(real, far, 2))


def slow_share(points: Tensor, centres: Tensor, k: int) -> float:
    inside = 0
    for point in points.tolist():
        for i, centre in enumerate(centres.tolist()):
            others = sorted(
                math.dist(centre, other) for j, other in enumerate(centres.tolist()) if j != i
            )
            if math.dist(point, centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


def test_precision_and_recall_are_the_slow_ones() -> None:
    real, generated = normal(40, 3, 0), normal(30, 3, 1, 1.0)
    expected = slow_share(generated, real, 3), slow_share(real, generated, 3)
    assert precision_recall(real, generated) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageDistances(Arrays("none.npz")),
        lambda: LayoutDistances(JSONLayouts("none.json")),
        lambda: MoleculeDistances(MoleculeFile("none.sdf")),
        lambda: Novelty(MoleculeFile("none.sdf")),
    ],
)
def test_a_source_that_is_missing_is_named_before_the_run(make: Callable[[], Metric]) -> None:
    with pytest.raises(BadArgument, match=r": source cannot be used: there is no .*none\."):
        make().check(GaussianMixturePipeline())
