"""What a run logged over its training, from TensorBoard's event files or from `metrics.csv`."""

import csv
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["AXES", "Curves", "read_curves"]

AXES = {"reward_calls": "cost/reward_calls", "samples": "cost/samples", "seconds": "time/elapsed"}
"""What curves are shown over, and the tag that says so at each step."""

_TRAINING = "train/"

Point = tuple[int, float]
"""A step and a value."""


@dataclass
class Curves:
    """Points by tag, in the order of their steps.

    Attributes:
        points: Of each tag.
        notes: A sentence for each file that could not be read to its end.
    """

    points: dict[str, list[Point]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, tag: str, step: int, value: float) -> None:
        """Add a point; a resumed run takes the place of what was lost after its checkpoint."""
        own = self.points.setdefault(tag, [])
        while own and own[-1][0] >= step:
            own.pop()
        own.append((step, value))

    def over(self, axis: str, steps: list[int]) -> list[float | None]:
        """Return where steps lie on an axis, None where the run did not log it.

        Args:
            axis: One of `AXES`.
            steps: Steps of a curve.
        """
        known = self.points.get(AXES[axis], [])
        places = [step for step, _ in known]
        found = [bisect_right(places, step) - 1 for step in steps]
        return [known[i][1] if i >= 0 else None for i in found]


def read_curves(folder: Path) -> Curves:
    """Return what the fits in a run's folder logged; TensorBoard's files come before CSV's.

    Files of tests and validations alone are left out: their steps are none of the training's.
    """
    curves = Curves()
    events = sorted(folder.rglob("*tfevents*"), key=_age)
    for path in events:
        _take(curves, dict(_grouped(_event_points(path, curves.notes))))
    if not curves.points:
        for path in sorted(folder.rglob("metrics.csv"), key=_age):
            _take(curves, dict(_grouped(_csv_points(path, curves.notes))))
    return curves


def _age(path: Path) -> tuple[float, str]:
    """Sort event files by the second in their names, others by their time."""
    parts = path.name.split(".")
    number = next((part for part in parts if part.isdigit() and len(part) >= 9), None)
    return (float(number) if number else path.stat().st_mtime, path.name)


def _take(curves: Curves, found: Mapping[str, list[Point]]) -> None:
    if not any(tag.startswith(_TRAINING) for tag in found):
        return
    for tag, points in found.items():
        for step, value in points:
            curves.add(tag, step, value)


def _grouped(points: Iterator[tuple[str, int, float]]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for tag, step, value in points:
        if math.isfinite(value):
            found.setdefault(tag, []).append((step, value))
    return found


def _event_points(path: Path, notes: list[str]) -> Iterator[tuple[str, int, float]]:
    """Iterate over the scalars of an event file, up to where it is damaged."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    size, count = 0, 0
    try:
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            size, count = size + len(record) + 16, count + 1  # with its length and two checksums
            for value in event.summary.value:
                if (number := _scalar(value)) is not None:
                    yield value.tag, event.step, number
        whole = size == path.stat().st_size
    except Exception:  # bytes that are no events end in errors of several libraries
        whole = False
    if not whole:
        notes.append(f"{path.name} is damaged after {count} records; its curves end there")


def _scalar(value: Any) -> float | None:
    """Return a scalar of an event, None for pictures and the like."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
        from tensorboard.util import tensor_util

        return float(np.asarray(tensor_util.make_ndarray(value.tensor)).reshape(-1)[0])
    return None


def _csv_points(path: Path, notes: list[str]) -> Iterator[tuple[str, int, float]]:
    """Iterate over the numbers of a CSVLogger's file, up to where it is damaged."""
    count = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                step = int(float(line["step"]))
                for tag, text in line.items():
                    if text and tag not in ("step", "epoch"):
                        yield tag, step, float(text)
                count += 1
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        notes.append(f"{path.name} is damaged after {count} lines; its curves end there")
