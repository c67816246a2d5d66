"""The dial of a tuned model: how strongly it is tuned, and which steps it runs, at test time."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from lit_rlft.core.checks import BadArgument, UsageError, at_least, below_one
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.evaluation.measurements import Arm
from lit_rlft.loop.reference import Reference
from lit_rlft.loop.relay import Relay
from lit_rlft.loop.route import Route, tuned_part

__all__ = ["Dial", "Setting", "dial_csv", "dial_rows", "dial_settings"]


class Setting(NamedTuple):
    """One setting of the dial.

    Attributes:
        arm: Its name in an evaluation, "<setting>=<value>".
        route: How the model draws at it.
        active: Makes the context within which it does.
    """

    arm: Arm
    route: Route
    active: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Dial:
    """Settings at which `test` draws from the tuned model beside its own, one changed at a time.

    Attributes:
        lora_scale: Factors of the LoRA's update, from 0: there it is the reference, at 1 the tuned
            model.
        cut: Shares of the sampler's last steps that the reference runs, in [0, 1).
        start: Shares of its first steps that the reference runs, in [0, 1).
    """

    lora_scale: list[float] | None = None
    cut: list[float] | None = None
    start: list[float] | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "lora_scale")
        below_one(self, "cut", "start")

    def check(self, num_steps: int, *, adapted: bool) -> None:
        """Check the values.

        Args:
            num_steps: The sampler's.
            adapted: Whether the tuned model has a LoRA.

        Raises:
            BadArgument: A value is impossible, or there is no LoRA to scale.
        """
        if self.lora_scale and not adapted:
            problem = "scales a LoRA, and model.init_args.lora is null; give cut or start"
            raise BadArgument(self, "lora_scale", problem)
        for cut in self.cut or ():
            Relay(cut=cut).check(self, num_steps)
        for start in self.start or ():
            Relay(start=start).check(self, num_steps)


def dial_settings(dial: Dial | None, route: Route, reference: Reference) -> Iterator[Setting]:
    """Iterate over the settings of a dial.

    Args:
        dial: The dial; None has none.
        route: How the tuned model draws.
        reference: The frozen model, whose adapter is scaled.

    Raises:
        UsageError: The tuned model runs no step: what is tuned is the prior.
    """
    if dial is None:
        return
    part = tuned_part(route.tuned_steps)
    num_steps, first = part["num_steps"], part["skipped_steps"]
    if not part["tuned_steps"]:
        raise UsageError("model.init_args.dial must be null: what is tuned runs no step")
    own = Relay(first / num_steps, 1 - (first + part["tuned_steps"]) / num_steps)
    for scale in dict.fromkeys(dial.lora_scale or ()):
        yield Setting(f"lora_scale={scale:g}", route, partial(reference.adapter.scaled, scale))
    for cut in dict.fromkeys(dial.cut or ()):
        relay = Relay(own.start, cut)
        yield Setting(f"cut={cut:g}", relay.of(route, reference), nullcontext)
    for start in dict.fromkeys(dial.start or ()):
        relay = Relay(start, own.cut)
        yield Setting(f"start={start:g}", relay.of(route, reference), nullcontext)


def dial_rows(summary: Mapping[Arm, Mapping[str, Moments]]) -> list[dict[str, Any]]:
    """Return the settings of a dial that were measured: `setting`, `value` and `metrics` of each.

    Args:
        summary: What was measured, by arm and metric.
    """
    rows = []
    for arm, metrics in summary.items():
        name, _, value = arm.partition("=")
        if value:
            rows.append({"setting": name, "value": float(value), "metrics": metrics})
    return rows


def dial_csv(rows: Sequence[Mapping[str, Any]], ends: Mapping[Arm, Mapping[str, Moments]]) -> str:
    """Return a table with a line for every setting, each metric beside its standard error.

    Args:
        rows: The settings (`dial_rows`).
        ends: What was measured of the reference and of the tuned model as it is.
    """
    names = list(ends["tuned"])
    header = ["setting", "value", *(f"{name}{end}" for name in names for end in ("", " sem"))]
    whole = [
        *({"setting": arm, "value": "", "metrics": metrics} for arm, metrics in ends.items()),
        *rows,
    ]
    lines = [header]
    for row in whole:
        found = [row["metrics"].get(name, {"mean": math.nan, "sem": math.nan}) for name in names]
        cells = [_cell(moments[key]) for moments in found for key in ("mean", "sem")]
        lines.append([row["setting"], str(row["value"]), *cells])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
