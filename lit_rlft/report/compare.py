r"""Runs compared on the same conditions and noise: gains, costs, and paired tests.

Samples of one row of the data are averaged first: the differences of two runs are one number per
row, and their test is the paired t-test over rows,

.. math:: t = \bar d / (s_d / \sqrt n), \quad n - 1 \text{ degrees of freedom}.

Rows count as independent, also where they repeat a prompt: the test is then for other rows of these
prompts. With one row alone the differences are one number per sample. Several pairs of runs are
tests of one question, so that their p values are adjusted by Holm's method.

References:
    A Simple Sequentially Rejective Multiple Test Procedure (Holm, 1979),
    https://www.jstor.org/stable/4615733
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from lit_rlft.core.checks import UsageError
from lit_rlft.report.comparable import Tested, check_comparable
from lit_rlft.report.numbers import DASH, duration, short, value, with_error
from lit_rlft.report.run import Run

__all__ = ["Comparison", "Paired", "compare", "holm", "paired_test", "to_csv", "to_text"]


@dataclass(frozen=True)
class Paired:
    """The difference of two runs on the same samples.

    Attributes:
        first: Name of the one run.
        second: Name of the other, which is subtracted.
        mean: Mean difference.
        sem: Its standard error; 0 where all differences are equal.
        count: Rows of the data, or samples, that the test counts.
        p: Probability of such a difference or a larger one by chance, two-sided.
        adjusted: The same, with all pairs of the comparison taken together (Holm).
    """

    first: str
    second: str
    mean: float
    sem: float
    count: int
    p: float
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """Runs that were compared.

    Attributes:
        metric: What by.
        runs: In the order they were given.
        pairs: Their differences.
        unit: What the tests count: "rows of the data" or "samples".
    """

    metric: str
    runs: Sequence[Run]
    pairs: Sequence[Paired]
    unit: str


def compare(runs: Sequence[Run], metric: str | None = None) -> Comparison:
    """Compare runs by a measurement.

    Args:
        runs: Two or more, tested.
        metric: Its name; None takes the trained reward.

    Raises:
        UsageError: The runs are not comparable, or have no such measurement.
    """
    tested = check_comparable(runs)
    name = metric or tested[0].reward
    unknown = [own.run for own in tested if f"tuned/{name}" not in own.columns]
    if unknown:
        known = sorted({key[6:] for key in tested[0].columns if key.startswith("tuned/")})
        raise UsageError(
            f"{unknown[0].folder} has no values of {name!r} by sample; there are {', '.join(known)}"
        )
    groups = _groups(tested[0])
    found = [
        (first.run.name, second.run.name, *_difference(first, second, name, groups))
        for first, second in combinations(tested, 2)
    ]
    adjusted = holm([one[-1] for one in found])
    pairs = [Paired(*one, extra) for one, extra in zip(found, adjusted, strict=True)]
    unit = "rows of the data" if len(set(groups.tolist())) > 1 else "samples"
    return Comparison(name, runs, pairs, unit)


def paired_test(differences: NDArray[np.float64]) -> tuple[float, float, int, float]:
    """Return the mean of paired differences, its error, their number, and the p value.

    Args:
        differences: [n], without NaN.
    """
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return mean, math.nan, count, math.nan
    sem = float(differences.std(ddof=1) / math.sqrt(count))
    if sem == 0:
        return mean, 0.0, count, 1.0 if mean == 0 else 0.0
    return mean, sem, count, float(2 * stdtr(count - 1, -abs(mean / sem)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's method; NaN stays and counts as none."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for place, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        adjusted[i] = largest
    return adjusted


def to_text(found: Comparison, *, markdown: bool = False) -> str:
    """Return the comparison as tables of text."""
    kept = any("kept" in run.metrics for run in found.runs)
    header = ["run", "reference", "tuned", "gain", *(["kept"] if kept else [])]
    header += ["reward calls", "denoiser calls", "training"]
    rows = []
    for run in found.runs:
        arms = [run.metrics.get(arm, {}).get(found.metric) for arm in ("tuned", "gain", "kept")]
        cost = run.metrics.get("cost", {})
        row = [run.name, value(_mean(run, "reference", found.metric)), with_error(arms[0])]
        row += [with_error(arms[1]), *([with_error(arms[2])] if kept else [])]
        row += [short(cost.get(name)) for name in ("reward_calls", "denoiser_calls")]
        rows.append([*row, duration(cost.get("seconds"))])
    pairs = [
        [
            f"{pair.first} - {pair.second}",
            with_error({"mean": pair.mean, "sem": pair.sem}),
            _p(pair.p),
            _p(pair.adjusted),
        ]
        for pair in found.pairs
    ]
    table = _markdown if markdown else _aligned
    count = found.pairs[0].count
    text = (
        f"Paired differences of {found.metric} on the same conditions and noise, "
        f"{count} {found.unit}:"
    )
    below = table(["pair", "difference", "p", "p (Holm)"], pairs)
    return f"{found.metric}\n\n{table(header, rows)}\n\n{text}\n\n{below}\n"


def to_csv(found: Comparison) -> tuple[str, str]:
    """Return every measurement of every run as CSV, a line each, and the paired differences."""
    first, second = io.StringIO(), io.StringIO()
    costs = ("reward_calls", "denoiser_calls", "seconds")
    arms = ("reference", "tuned", "gain", "kept")
    out = csv.writer(first, lineterminator="\n")
    moments = [f"{arm}{end}" for arm in arms for end in ("", "_sem")]
    out.writerow(["run", "metric", *moments, *costs])
    for run in found.runs:
        for name in run.metrics["tuned"]:
            own: list[object] = []
            for arm in arms:
                numbers = run.metrics.get(arm, {}).get(name) or {}
                own += [numbers.get("mean"), numbers.get("sem")]
            cost: Mapping[str, object] = run.metrics.get("cost", {})
            out.writerow([run.name, name, *own, *(cost.get(key) for key in costs)])
    out = csv.writer(second, lineterminator="\n")
    out.writerow(["first", "second", "metric", "difference", "sem", "count", "p", "p_holm"])
    for pair in found.pairs:
        numbers = (pair.mean, pair.sem, pair.count, pair.p, pair.adjusted)
        out.writerow([pair.first, pair.second, found.metric, *numbers])
    return first.getvalue(), second.getvalue()


def _groups(tested: Tested) -> NDArray[np.int64]:
    return np.array([row for row, _, _ in tested.keys], np.int64)


def _difference(
    first: Tested, second: Tested, name: str, groups: NDArray[np.int64]
) -> tuple[float, float, int, float]:
    """Test the difference of two runs over the samples that both have a number of."""
    apart = first.columns[f"tuned/{name}"] - second.columns[f"tuned/{name}"]
    known = ~np.isnan(apart)
    apart, groups = apart[known], groups[known]
    rows, place = np.unique(groups, return_inverse=True)
    if len(rows) > 1:
        apart = np.bincount(place, apart) / np.bincount(place)
    return paired_test(apart)


def _mean(run: Run, arm: str, name: str) -> float | None:
    return (run.metrics.get(arm, {}).get(name) or {}).get("mean")


def _p(p: float) -> str:
    if math.isnan(p):
        return DASH
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        first, *others = row
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
