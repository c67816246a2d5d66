"""Aggregates over runs with bootstrap intervals: interquartile mean, probability of improvement.

References:
    Deep Reinforcement Learning at the Edge of the Statistical Precipice (Agarwal et al., 2021),
    https://arxiv.org/abs/2108.13264
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["Estimate", "improvement", "interquartile_mean"]

_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return `value (low to high)`, each in the given format."""
        value, low, high = (format(number, spec) for number in self)
        return f"{value} ({low} to {high})"


def interquartile_mean(runs: Sequence[float], level: float = 0.95) -> Estimate:
    """Return the mean of the middle half of runs, with a percentile bootstrap interval.

    With fewer than 4 runs nothing is cut off.
    """
    return _bootstrapped(lambda x, axis=-1: stats.trim_mean(x, 0.25, axis=axis), level, runs)


def improvement(runs: Sequence[float], others: Sequence[float], level: float = 0.95) -> Estimate:
    """Return the probability that a run is better than one of another method; a tie is a half.

    The interval is a percentile bootstrap over the runs of both.
    """

    def share(x: ArrayLike, y: ArrayLike, axis: int = -1) -> np.ndarray:
        first, second = np.asarray(x)[..., :, None], np.asarray(y)[..., None, :]
        return ((first > second) + 0.5 * (first == second)).mean(axis=(-2, -1))

    return _bootstrapped(share, level, runs, others)


def _bootstrapped(statistic, level: float, *samples: Sequence[float]) -> Estimate:  # type: ignore[no-untyped-def]  # noqa: ANN001
    values = [np.asarray(sample, dtype=np.float64) for sample in samples]
    point = float(statistic(*values))
    if min(map(len, values)) < 2:
        return Estimate(point, float("nan"), float("nan"))
    draws = stats.bootstrap(
        values,
        statistic,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return Estimate(
        point, float(draws.confidence_interval.low), float(draws.confidence_interval.high)
    )
