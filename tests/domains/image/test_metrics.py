"""Metrics of sets of images: names that say the features, whole batches, errors."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from domains.image.metrics import Diversity, SetDistances
from domains.image.networks.features import FeatureArchitecture, FeatureNetwork, load_features
from domains.image.sources import Digits, Generated
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.evaluation.jackknife import compared
from lit_rlft.evaluation.measurements import moments
from lit_rlft.kit.statistics import kernel_distance, precision_recall
from tests.domains.image.sources.test_sources import paint
from tests.support import ROOT

_SHARES = ("precision", "recall")


def condition_of(num: int) -> Condition:
    return Condition([{"name": "image"}], {}, torch.zeros(num, dtype=torch.int64))


def digits(num: int, first: int = 0) -> torch.Tensor:
    pixels = torch.from_numpy(Digits().load().pixels[first : first + num])
    return pixels.expand(-1, 3, -1, -1) / 255


def distances(metric: SetDistances, pictures: torch.Tensor) -> dict[str, float]:
    return metric.compare(metric.features(pictures, condition_of(len(pictures))))


def test_distances_are_torchmetrics_with_the_network_as_its_module() -> None:
    metric = SetDistances(max_images=None)
    samples = digits(100).flip(-1)
    values = distances(metric, samples)
    network = load_features("digits_features")
    fid = FrechetInceptionDistance(network)
    kid = KernelInceptionDistance(network, subsets=10, subset_size=100)
    real = digits(1797)
    for part in (fid, kid):
        part.update(real, real=True)
        part.update(samples, real=False)
    name = "digits_features"
    assert set(values) == {f"{m}_{name}" for m in ("fid", "kid", "precision", "recall")}
    assert values[f"fid_{name}"] == pytest.approx(float(fid.compute()), rel=1e-4)
    with torch.no_grad():
        features = [network(pictures) for pictures in (real, samples)]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the subsets
        mean, deviation = map(float, kid.compute())
    assert values[f"kid_{name}"] == pytest.approx(mean, abs=4 * deviation / 10**0.5)
    assert values[f"kid_{name}"] == pytest.approx(kernel_distance(*features)[0], rel=1e-5)
    precision, recall = precision_recall(*features)
    assert values[f"precision_{name}"] == pytest.approx(precision)
    assert values[f"recall_{name}"] == pytest.approx(recall)
    # Batches do not matter, and no value is one image's.
    parts = [metric.features(part, condition_of(50)) for part in samples.split(50)]
    halves = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert metric.compare(halves) == pytest.approx(values, rel=1e-5)
    assert metric.evaluate(samples, condition_of(100)) == {}


def test_real_images_are_closer_than_other_ones() -> None:
    metric = SetDistances()
    real = distances(metric, digits(128, 500))
    noise = distances(metric, torch.rand(128, 3, 8, 8))
    name = "digits_features"
    assert real[f"fid_{name}"] < 0.5 * noise[f"fid_{name}"]
    assert real[f"kid_{name}"] < 0.5 * noise[f"kid_{name}"]
    assert real[f"precision_{name}"] > 0.9 > 0.5 > noise[f"precision_{name}"]


def test_other_features_have_other_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    FeatureNetwork(FeatureArchitecture(4, 3, ["a", "b"])).save(tmp_path / "mine")
    metric = SetDistances(Generated(paint, 20, 4), features=str(tmp_path / "mine"))
    values = distances(metric, torch.rand(10, 3, 4, 4))
    assert len(values) == 4 and all("_mine-" in name for name in values)


def test_the_real_images_are_drawn_from_all() -> None:
    metric = SetDistances(max_images=100)
    few = metric.real_features()
    every = SetDistances(max_images=None).real_features()
    assert few.shape == (100, 64) and every.shape == (1797, 64)
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(few, every, compute_mode=exact).min(dim=1)
    assert distances.values.max() < 1e-4
    assert distances.indices.max() > 1500 and distances.indices.min() < 300


def test_one_image_measures_nothing() -> None:
    assert all(math.isnan(value) for value in distances(SetDistances(), digits(1)).values())
    assert Diversity().evaluate(digits(1), condition_of(1))["diversity"].isnan().all()


def test_diversity_by_hand() -> None:
    pictures = torch.zeros(3, 3, 2, 2)
    pictures[1] = 1
    values = Diversity().evaluate(pictures, condition_of(3))["diversity"]
    # Mean 2/3; without the second picture 0, without another one 1: 3 * 2/3 - 2 * (0 or 1).
    torch.testing.assert_close(values, torch.tensor([0.0, 2.0, 0.0]))


@pytest.mark.parametrize(("num_conditions", "num_each"), [(1, 64), (32, 4)])
def test_the_error_of_diversity_is_the_true_deviation(num_conditions: int, num_each: int) -> None:
    # Grey x of [0, 1] at random: the distance |x - y| has mean 1/3 and variance 1/18, its mean over
    # y has variance 1/180, and the variance of a U-statistic of n is known (Hoeffding, 1948).
    pairs = num_each * (num_each - 1) / 2
    true = (2 * (num_each - 2) / 180 + 1 / 18) / pairs / num_conditions
    rows = torch.arange(num_conditions).repeat_interleave(num_each)
    condition = Condition([{"name": "image"}] * num_conditions, {}, rows)
    draws, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        pictures = torch.rand(len(rows), 1, 1, 1, generator=draws).expand(-1, 3, 2, 2)
        values = Diversity().evaluate(pictures, condition)["diversity"]
        # Without conditions each image is a row of the data.
        found.append(moments(values, rows if num_conditions > 1 else torch.arange(num_each)))
    reported = sum(one["sem"] ** 2 for one in found) / len(found)
    assert reported**0.5 == pytest.approx(true**0.5, rel=0.1)
    assert sum(one["mean"] for one in found) / len(found) == pytest.approx(1 / 3, abs=5e-3)


def test_errors_fall_with_the_number_of_images() -> None:
    metric = SetDistances(max_images=500)
    # More variety than one digit, but another law than the real images.
    pictures = torch.cat([digits(200, 300), digits(200, 300).flip(-1)])
    features = metric.features(pictures, condition_of(400))
    arms = {"few": {key: value[::8] for key, value in features.items()}, "many": features}
    found = compared(metric, arms, num_draws=20)
    name = "fid_digits_features"
    assert set(found["few"]) == {f"{m}_digits_features" for m in ("fid", "kid", *_SHARES)}
    # Eight times the images: about a third of the error.
    assert 0 < found["many"][name]["sem"] < 0.6 * found["few"][name]["sem"]
    assert found["many"][name]["mean"] == pytest.approx(distances(metric, pictures)[name])
    # The closed form of one model's KID.
    kid, error = kernel_distance(metric.real_features(), features["features"])
    assert found["many"]["kid_digits_features"]["mean"] == pytest.approx(kid)
    assert found["many"]["kid_digits_features"]["sem"] == pytest.approx(error, rel=0.1)


def test_bad_features_are_refused() -> None:
    with pytest.raises(UsageError, match="SetDistances: features 'none' could not be loaded"):
        SetDistances(features="none")


@pytest.mark.parametrize("num", [0, 1000])
def test_the_benchmark_says_how_many_images_there_are(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["image_models.py", "--num", str(num)])
    with pytest.raises(SystemExit, match=r"digits has 1797; give --num 898 or less"):
        runpy.run_path(str(ROOT / "benchmarks/image_models.py"), run_name="__main__")
