"""Metrics of whole sets of samples, with bootstrap standard errors.

References:
    Bootstrap Methods: Another Look at the Jackknife (Efron, 1979),
    https://doi.org/10.1214/aos/1176344552
"""

import sys
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_rlft.core.reward import SetMetric

__all__ = ["Features", "Moments", "compared"]

Features = dict[str, Tensor]
"""Features of n samples for a metric of whole sets, [n, ...] each."""

Moments = dict[str, float]
"""{"mean", "sem"}: a number and its standard error."""


def compared(
    metric: SetMetric, arms: Mapping[str, Features], num_draws: int, seed: int = 0
) -> dict[str, dict[str, Moments]]:
    """Return the metric of each model's samples and, as "gain", tuned - reference.

    A standard error is the deviation over sets that are drawn with replacement from the samples,
    the same rows of every model, so that the error of the gain is that of a paired difference.
    Means over such sets are of no use: repeated samples raise FID, KID and MMD. Beside the
    deviation over 60 independent sets (300 normal vectors in 6 dimensions, twice) the error was
    right within 15 % for FID and precision, and up to two thirds too large for recall, whose radii
    shrink where vectors are repeated.

    Args:
        metric: What is measured.
        arms: Features by model; samples of "tuned" and "reference" are pairs.
        num_draws: Sets drawn; below 2 there are no errors, NaN.
        seed: Seed of the draws.
    """
    values = _with_gain({arm: metric.compare(features) for arm, features in arms.items()})
    if num_draws and (known := _known_errors(metric, arms)) is not None:
        return {
            arm: {
                name: {"mean": value, "sem": known[arm].get(name, float("nan"))}
                for name, value in own.items()
            }
            for arm, own in values.items()
        }
    draws: dict[tuple[str, str], list[float]] = defaultdict(list)
    generator = torch.Generator().manual_seed(seed)
    sizes = {arm: len(next(iter(features.values()))) for arm, features in arms.items()}
    # Not below a live display of rich, which would show it without end in a notebook.
    hidden = num_draws < 2 or hasattr(sys.stderr, "rich_proxied_file")
    for _ in tqdm(range(num_draws), "Bootstrap", disable=hidden, leave=False):
        rows = {n: torch.randint(n, (n,), generator=generator) for n in sorted({*sizes.values()})}
        drawn = {
            arm: metric.compare_draw({name: x[rows[sizes[arm]]] for name, x in features.items()})
            for arm, features in arms.items()
        }
        for arm, own in _with_gain(drawn).items():
            for name, value in own.items():
                draws[arm, name].append(value)
    return {
        arm: {
            name: {"mean": value, "sem": _deviation(draws[arm, name])}
            for name, value in own.items()
        }
        for arm, own in values.items()
    }


def _known_errors(
    metric: SetMetric, arms: Mapping[str, Features]
) -> dict[str, dict[str, float]] | None:
    """Return the errors that a metric knows by itself, of the gain too; None where it does not."""
    known: dict[str, dict[str, float]] = {}
    for arm, features in arms.items():
        errors = metric.errors(features)
        if errors is None:
            return None
        known[arm] = errors
    known["gain"] = {}
    pair = [arms[arm] for arm in ("tuned", "reference") if arm in arms]
    if len(pair) == 2 and len({len(next(iter(features.values()))) for features in pair}) == 1:
        known["gain"] = metric.errors(*pair) or {}
    return known


def _with_gain(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    if "tuned" not in values or "reference" not in values:
        return values
    tuned, reference = values["tuned"], values["reference"]
    return {**values, "gain": {name: tuned[name] - reference[name] for name in tuned}}


def _deviation(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return float(torch.tensor(values, dtype=torch.float64).std())
