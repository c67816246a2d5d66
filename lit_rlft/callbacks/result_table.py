"""The result of a test as a table of text: reference, tuned and gain of every metric."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["result_table"]

Moments = Mapping[str, float]
"""{"mean", "sem"}: a number and its standard error, NaN where it has none."""
Summary = Mapping[str, Mapping[str, Moments]]
"""By arm ("reference", "tuned", "gain", "kept", or a baseline's name) and metric."""

_COMPARED = ("gain", "kept")
"""Arms that compare others, with their errors."""

_GAP = "  "


def result_table(summary: Summary, width: int = 80) -> str:
    """Return a line per metric: reference, baselines, tuned, gain, share kept of best of n.

    Baselines that do not fit stand in a table of their own below, in as many as it takes.

    Args:
        summary: What was measured.
        width: Columns of text at most; names of metrics are shortened to fit.
    """
    names = list(summary["tuned"])
    label = min(max(map(len, ["metric", *names])), width // 2)
    ends = ["tuned", *(arm for arm in _COMPARED if arm in summary)]
    baselines = [arm for arm in summary if arm not in ("reference", *ends)]
    inner = _columns(summary, ["reference", *baselines, *ends], names)
    if _width(inner) + label <= width:
        return _text(names, inner, label)
    main = _columns(summary, ["reference", *ends], names)
    tables = [_text(names, main, max(6, min(label, width - _width(main))))]
    rest = _columns(summary, baselines, names)
    while rest:
        fitting = 1
        while fitting < len(rest) and _width(rest[: fitting + 1]) + label <= width:
            fitting += 1
        tables.append(_text(names, rest[:fitting], label))
        rest = rest[fitting:]
    return "\n\n".join(tables)


def _columns(summary: Summary, arms: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return each arm's column, its name first."""
    return [_padded([arm, *(_cell(summary, arm, name) for name in names)]) for arm in arms]


def _cell(summary: Summary, arm: str, name: str) -> str:
    """Return a number, of the gain with its error, with as many decimals as the error allows."""
    moments = summary[arm].get(name)
    if moments is None or math.isnan(moments["mean"]):
        return "-"
    row = [own[name] for other, own in summary.items() if name in own and other != "kept"]
    form = _format([moments] if arm == "kept" else row)  # a share has no unit
    error = moments["sem"] if arm in _COMPARED else math.nan
    text = format(moments["mean"], form)
    return text if math.isnan(error) else f"{text} ± {format(error, form)}"


def _format(row: Sequence[Moments]) -> str:
    """Return the format of a metric's numbers: two digits of the least error, or four in all."""
    means = [abs(moments["mean"]) for moments in row if moments["mean"]]
    errors = [moments["sem"] for moments in row if moments["sem"] > 0]
    largest = max((mean for mean in means if not math.isnan(mean)), default=1.0)
    if not math.isfinite(largest) or not 1e-4 < largest < 1e6:
        return ".2e"
    digits = 1 - _exponent(min(errors)) if errors else 3 - _exponent(largest)
    return f".{min(max(digits, 0), 5)}f"


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))


def _padded(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(len(_GAP) + len(column[0]) for column in columns)


def _text(names: Sequence[str], columns: Sequence[Sequence[str]], label: int) -> str:
    labels = [_shortened(name, label).ljust(label) for name in ("metric", *names)]
    rows = zip(labels, *columns, strict=True)
    return "\n".join(_GAP.join(row).rstrip() for row in rows)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 2]}.."
