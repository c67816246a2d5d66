"""Aggregates of benchmarks: hand-made values, and intervals that hold what they should."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def aggregates() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "aggregates.py"
    spec = importlib.util.spec_from_file_location("aggregates", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_middle_half_is_averaged(aggregates: ModuleType) -> None:
    """One run that went astray does not move it."""
    assert aggregates.interquartile_mean([8, 1, 3, 2, 4, 5, 6, 7]).value == 4.5
    assert aggregates.interquartile_mean([800, 1, 3, 2, 4, 5, 6, 7]).value == 4.5
    assert aggregates.interquartile_mean([1.0, 2.0, 6.0]).value == 3.0


def test_a_run_against_every_run_of_the_other(aggregates: ModuleType) -> None:
    assert aggregates.improvement([1, 2], [0, 1.5]).value == 0.75
    assert aggregates.improvement([1, 2], [1, 2]).value == 0.5  # ties are halves
    apart = aggregates.improvement([5, 6, 7], [1, 2, 3])
    assert tuple(apart) == (1.0, 1.0, 1.0)


def test_the_interval_of_normal_runs(aggregates: ModuleType) -> None:
    """Nearly that of the mean over many runs, whose middle half has a variance of 1.2 / n."""
    runs = np.random.default_rng(0).normal(size=400)
    found = aggregates.interquartile_mean(runs)
    assert found.low < 0 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (1.2 / 400) ** 0.5, rel=0.15)


def test_one_run_has_no_interval(aggregates: ModuleType) -> None:
    found = aggregates.interquartile_mean([3.0])
    assert found.value == 3.0 and math.isnan(found.low) and math.isnan(found.high)
    assert f"{found:.1f}" == "3.0 (nan to nan)"
