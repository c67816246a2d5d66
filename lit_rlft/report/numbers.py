"""Numbers with their errors, as text."""

import math
from collections.abc import Mapping

__all__ = ["DASH", "duration", "short", "value", "with_error"]

DASH = "-"
"""What stands where nothing is known."""

Moments = Mapping[str, float | None]


def value(mean: float | None) -> str:
    """Return a number with four digits, a dash for none."""
    return DASH if mean is None or math.isnan(mean) else f"{mean:.4g}"


def with_error(moments: Moments | None) -> str:
    """Return a mean and its error, both with two digits of the error."""
    mean, sem = (moments or {}).get("mean"), (moments or {}).get("sem")
    if mean is None or math.isnan(mean) or sem is None or math.isnan(sem):
        return value(mean)
    if sem <= 0:
        return f"{mean:.4g} ± 0"
    largest = max(abs(mean), sem)
    if not 1e-4 < largest < 1e6:
        return f"{mean:.3g} ± {sem:.2g}"
    digits = min(max(1 - math.floor(math.log10(sem)), 0), 6)
    return f"{mean:.{digits}f} ± {sem:.{digits}f}"


def short(count: float | None) -> str:
    """Return a count as a person says it: 845, 2.1 k, 860 M; a dash for none."""
    if count is None:
        return DASH
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(count) >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:.4g}"


def duration(seconds: float | None) -> str:
    """Return a time: 8.2 s, 12 min, 3.4 h; a dash for none."""
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
