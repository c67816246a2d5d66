r"""Metrics of whole sets of samples, with jackknife standard errors.

A metric T of n samples is computed without each of them, or without each of G groups, and without
some pairs of these. With :math:`Q_{ij} = n T - (n - 1)(T_{-i} + T_{-j}) + (n - 2) T_{-ij}`, its
variance is

.. math:: \frac{n - 1}{n} \Big( \sum_i (T_{-i} - \bar T)^2 - \tfrac12 \mathrm{Var}\, Q \Big).

The first term alone counts what depends on two samples together twice, which is most of KID or FID
where the models are near to the data: errors would be up to 1.4 times too large. The difference is
unbiased for statistics of one and two samples (U-statistics of order two). Nothing is drawn with
replacement: repeated samples lower the rank of a covariance and the distances of neighbours.

Samples of one row of the data depend on each other. Where rows have several, groups are of whole
rows, and the closed forms for single samples are not used.

References:
    The Jackknife Estimate of Variance (Efron & Stein, 1981), https://doi.org/10.1214/aos/1176345462
    The Jackknife, the Bootstrap and Other Resampling Plans (Efron, 1982), chapter 4,
    https://doi.org/10.1137/1.9781611970319
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_rlft.core.answers import is_number
from lit_rlft.core.checks import UsageError
from lit_rlft.core.reward import SetMetric
from lit_rlft.core.state import described

__all__ = ["Features", "Moments", "compared"]

Features = dict[str, Tensor]
"""Features of n samples for a metric of whole sets, [n, ...] each."""

Moments = dict[str, float]
"""{"mean", "sem"}: a number and its standard error."""

_PAIRS_EACH = 4  # pairs of samples for each sample
_FEWEST = 4  # samples, or groups with pairs: two must be left


@dataclass(frozen=True)
class _Jackknife:
    """A number of G samples or groups, and what it is without some of them.

    Attributes:
        whole: The number.
        each: Without each one, [G].
        both: Without some pairs, [P].
        pairs: Which, [P, 2].
    """

    whole: float
    each: Tensor
    both: Tensor
    pairs: Tensor

    def __sub__(self, other: "_Jackknife") -> "_Jackknife":
        """Return that of the difference of two models' numbers on the same samples' noise."""
        each, both = self.each - other.each, self.both - other.both
        return _Jackknife(self.whole - other.whole, each, both, self.pairs)

    def error(self) -> float:
        """Return the standard error, NaN where a number is."""
        num = len(self.each)
        if num < 2:
            return float("nan")
        first = (self.each - self.each.mean()).square().sum()
        alone = self.each[self.pairs].sum(dim=1)
        joint = num * self.whole - (num - 1) * alone + (num - 2) * self.both
        # A noisy correction may be too large; fewer than three pairs give none.
        pairs = 0.5 * joint.var() if len(joint) > 2 else first.new_zeros(())
        rest = torch.maximum(first - pairs, first / 4)
        return float(((num - 1) / num * rest).sqrt())


def compared(
    metric: SetMetric,
    arms: Mapping[str, Features],
    num_draws: int,
    seed: int = 0,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Moments]]:
    """Return the metric of each model's samples and, as "gain", tuned - reference.

    The tuned model's numbers hold those that are of both models, such as win rates.

    A standard error is that of drawing other rows of the data, each with as many samples; without
    rows or with one alone, that of drawing other samples. The gain's is that of a paired
    difference: the same samples of both models are left out together.

    Args:
        metric: What is measured.
        arms: Features by model; samples of "tuned" and "reference" are pairs.
        num_draws: Groups that are left out in turn for numbers without `SetMetric.left_out`; below
            2 there are no errors at all, NaN.
        seed: Seed of the groups and of the pairs.
        rows: By model, the row of the data of each sample, int64 [n]; None takes all samples as
            independent.
    """
    shared = {arm: _shared(rows[arm]) if rows else None for arm in arms}
    values = {arm: _numbers(metric, features) for arm, features in arms.items()}
    errors: dict[str, dict[str, float]] = {}
    if num_draws >= 2:
        errors = _known_errors(metric, arms, shared) or _jackknife_errors(
            metric, arms, values, num_draws, seed, shared
        )
    if "tuned" in values and "reference" in values:
        tuned, reference = values["tuned"], values["reference"]
        values["gain"] = {name: tuned[name] - reference[name] for name in tuned}
    found = {
        arm: {
            name: {"mean": value, "sem": errors.get(arm, {}).get(name, float("nan"))}
            for name, value in own.items()
        }
        for arm, own in values.items()
    }
    if "gain" in found and _length(arms["tuned"]) == _length(arms["reference"]):
        found["tuned"] |= {
            name: {"mean": value, "sem": error}
            for name, (value, error) in metric.beside(
                arms["tuned"], arms["reference"], rows=shared["tuned"]
            ).items()
        }
    return found


def _numbers(metric: SetMetric, features: Features) -> dict[str, float]:
    """Return `compare`'s numbers.

    Raises:
        UsageError: It returns something else.
    """
    found: Any = metric.compare(features)
    name = f"{type(metric).__name__}.compare"
    if not isinstance(found, dict):
        raise UsageError(f"{name} returned {described(found)}; it is a dict of numbers")
    for key, value in found.items():
        if not is_number(value):
            raise UsageError(f"{name} returned {described(value)} as {key!r}; it is a number")
    return {key: float(value) for key, value in found.items()}


def _shared(rows: Tensor) -> Tensor | None:
    """Return the rows unless each has one sample, or one has all."""
    return rows if 1 < len(rows.unique()) < len(rows) else None  # type: ignore[no-untyped-call]


def _known_errors(
    metric: SetMetric, arms: Mapping[str, Features], rows: Mapping[str, Tensor | None]
) -> dict[str, dict[str, float]] | None:
    """Return the errors that a metric knows by itself, of the gain too; None where it does not."""
    known: dict[str, dict[str, float]] = {}
    for arm, features in arms.items():
        errors = metric.errors(features, rows=rows[arm])
        if errors is None:
            return None
        known[arm] = errors
    pair = [arms[arm] for arm in ("tuned", "reference") if arm in arms]
    if len(pair) == 2 and len({_length(features) for features in pair}) == 1:
        known["gain"] = metric.errors(*pair, rows=rows["tuned"]) or {}
    return known


def _jackknife_errors(
    metric: SetMetric,
    arms: Mapping[str, Features],
    values: Mapping[str, Mapping[str, float]],
    num_groups: int,
    seed: int,
    rows: Mapping[str, Tensor | None],
) -> dict[str, dict[str, float]]:
    """Return the errors of each model's numbers and of the gain."""
    parts = {
        arm: _jackknives(metric, features, values[arm], num_groups, seed, rows[arm])
        for arm, features in arms.items()
    }
    errors = {arm: {name: part.error() for name, part in own.items()} for arm, own in parts.items()}
    if "tuned" in parts and "reference" in parts:
        errors["gain"] = _errors_of_gain(parts["tuned"], parts["reference"])
    return errors


def _jackknives(
    metric: SetMetric,
    features: Features,
    values: Mapping[str, float],
    num_groups: int,
    seed: int,
    rows: Tensor | None,
) -> dict[str, _Jackknife]:
    """Return the jackknife of each number, by its closed form where there is one."""
    if rows is not None:
        _, units = torch.unique(rows, return_inverse=True)
        return _by_groups(metric.compare, features, values, num_groups, seed, units)
    known = _closed_forms(metric, features, values, seed)
    others = {name: value for name, value in values.items() if name not in known}
    units = torch.arange(_length(features))
    return known | _by_groups(metric.compare_draw, features, others, num_groups, seed, units)


def _closed_forms(
    metric: SetMetric, features: Features, values: Mapping[str, float], seed: int
) -> dict[str, _Jackknife]:
    """Return the jackknife over single samples of the numbers that have closed forms."""
    num = _length(features)
    if num < _FEWEST:
        return {}
    pairs = _pairs(num, _PAIRS_EACH, seed)
    found = metric.left_out(features, pairs)
    return {name: _Jackknife(values[name], *left, pairs) for name, left in found.items()}


def _by_groups(
    compare: Callable[[Features], dict[str, float]],
    features: Features,
    values: Mapping[str, float],
    num_groups: int,
    seed: int,
    units: Tensor,
) -> dict[str, _Jackknife]:
    """Return the jackknife over groups of units of all numbers, unless there are none.

    Args:
        compare: Returns the numbers of some samples.
        features: Of all samples.
        values: The numbers of all samples.
        num_groups: How many groups, at most.
        seed: Of the groups and pairs.
        units: int64 [n], from 0, whose samples are left out together.
    """
    num = int(units.max()) + 1 if len(units) else 0
    if not values or num < _FEWEST:
        return {}
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    groups = order.tensor_split(min(num_groups, num))  # none much smaller than the others
    count = len(groups)
    pairs = _pairs(count, 1, seed) if count >= _FEWEST else torch.empty(0, 2, dtype=torch.int64)
    # Not below a live display of rich, which would show it without end in a notebook.
    hidden = hasattr(sys.stderr, "rich_proxied_file")
    left_out = [[g] for g in range(count)] + pairs.tolist()
    drawn = []
    for chosen in tqdm(left_out, "Standard errors", disable=hidden, leave=False):
        present = torch.ones(num, dtype=torch.bool)
        present[torch.cat([groups[g] for g in chosen])] = False
        drawn.append(compare({name: x[present[units]] for name, x in features.items()}))
    numbers = {
        name: torch.tensor([own[name] for own in drawn], dtype=torch.float64)
        for name in values
        if all(name in own for own in drawn)
    }
    return {
        name: _Jackknife(values[name], own[:count], own[count:], pairs)
        for name, own in numbers.items()
    }


def _errors_of_gain(
    tuned: Mapping[str, _Jackknife], reference: Mapping[str, _Jackknife]
) -> dict[str, float]:
    errors = {}
    for name, part in tuned.items():
        other = reference.get(name)
        if other is None:
            continue
        paired = len(part.each) == len(other.each)
        errors[name] = (part - other).error() if paired else math.hypot(part.error(), other.error())
    return errors


def _pairs(num: int, for_each: int, seed: int) -> Tensor:
    """Return pairs of different ones of num, each as often; all where these are no more, [P, 2]."""
    if num - 1 <= 2 * for_each:
        return torch.combinations(torch.arange(num))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.stack([order, order.roll(i)], 1) for i in range(1, for_each + 1)])


def _length(features: Features) -> int:
    return len(next(iter(features.values())))
