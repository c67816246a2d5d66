"""FID against statistics that another program saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from domains.image.metrics import FrechetDistance, SetDistances
from domains.image.networks.features import features_of, load_features
from domains.image.pipeline import ImagePipeline
from domains.image.sources import Arrays, Digits
from lit_rlft.core.checks import UsageError
from tests.domains.image.test_metrics import condition_of, digits

FEATURES = "digits_features"
NAME = "fid_digits_features_real"


def features(pictures: torch.Tensor) -> np.ndarray:
    return features_of(load_features(FEATURES), pictures).double().numpy()


def saved(path: Path, real: np.ndarray, dtype: Any = np.float64) -> Path:
    """Write what pytorch-fid writes: the mean, and numpy's covariance."""
    mean, covariance = real.mean(axis=0), np.cov(real, rowvar=False)
    np.savez(path, mu=mean.astype(dtype), sigma=covariance.astype(dtype))
    return path


def check(path: Path) -> None:
    """Look at the file as a run does before it starts."""
    FrechetDistance(str(path), FEATURES).check(ImagePipeline("digits"))


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return saved(tmp_path / "real.npz", features(digits(400)))


def test_it_is_the_formula_of_pytorch_fid(path: Path) -> None:
    samples = digits(120, first=900).flip(-1)
    metric = FrechetDistance(str(path), FEATURES)
    real, generated = features(digits(400)), features(samples)
    first, second = (np.cov(each, rowvar=False) for each in (real, generated))
    root = scipy.linalg.sqrtm(first @ second).real
    shift = real.mean(axis=0) - generated.mean(axis=0)
    expected = shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root)
    found = metric.compare(metric.features(samples, condition_of(len(samples))))
    assert set(found) == {NAME}
    assert found[NAME] == pytest.approx(expected, rel=1e-4)


def test_values_and_errors_are_those_of_the_images_themselves(path: Path) -> None:
    samples, pairs = digits(60, first=900), torch.tensor([[0, 1], [4, 30]])
    np.save(path.with_suffix(".npy"), Digits().load().pixels[:400])
    source = Arrays(str(path.with_suffix(".npy")))
    metric, known = FrechetDistance(str(path), FEATURES), SetDistances(source, max_images=None)
    seen = metric.features(samples, condition_of(len(samples)))
    both = metric.compare(seen)[NAME], known.compare(seen)[f"fid_{FEATURES}"]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    ours, theirs = metric.left_out(seen, pairs)[NAME], known.left_out(seen, pairs)
    expected = theirs[f"fid_{FEATURES}"]
    torch.testing.assert_close(ours.each, expected.each, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.both, expected.both, rtol=1e-4, atol=1e-6)


def test_single_precision_is_read(tmp_path: Path, path: Path) -> None:
    (tmp_path / "single").mkdir()
    single = saved(tmp_path / "single" / "real.npz", features(digits(400)), np.float32)
    samples = digits(60, first=900)
    values = []
    for each in (path, single):
        metric = FrechetDistance(str(each), FEATURES)
        values.append(metric.compare(metric.features(samples, condition_of(60)))[NAME])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(64)}, "is no .npz file with arrays mu and sigma, as pytorch-fid"),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048)},
            r"mu \(2048,\) .* the features have 64 numbers; give the feature network",
        ),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "not finite, or not symmetric"),
        ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "not finite, or not symmetric"),
        ({"mu": np.array([object()]), "sigma": np.eye(64)}, "is no .npz file"),
    ],
)
def test_other_files_are_refused(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=rf"statistics .*{said}"):
        check(tmp_path / "x.npz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"statistics .*nowhere\.npz"):
        check(tmp_path / "nowhere.npz")
