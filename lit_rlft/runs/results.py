"""Results of a run by checkpoint: those of another one are kept under a name of their own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lit_rlft.core.checks import from_json

__all__ = ["SAMPLES", "checkpoint_of", "keep_others", "measured", "named"]

SAMPLES = "test_samples.csv"
"""File of what a test measured of each sample."""

Measured = Mapping[str, Any] | str | None
"""A checkpoint's file and counters, None for the untuned model; text where nothing is known."""

_UNKNOWN = "an unnamed checkpoint"


def measured(path: str | Path | None, counters: Mapping[str, int], folder: Path) -> Measured:
    """Return what a result says of the model it is of.

    Args:
        path: The checkpoint's file; None where the model is in memory alone.
        counters: Of the model's training.
        folder: The run's; files within are named relative to it.
    """
    if path is None and not any(counters.values()):
        return None
    if path is not None:
        path = named(Path(os.path.abspath(path)), Path(os.path.abspath(folder)))
    return {"path": path, **counters}


def named(path: PurePath, folder: PurePath) -> str:
    """Return the name of a file for a folder that may move: relative to it where it lies within."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def checkpoint_of(path: Path) -> Measured:
    """Return what a result (JSON, or JSON lines) says of its checkpoint."""
    try:
        text = path.read_text(encoding="utf-8")
        found = from_json(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
        return found.get("checkpoint", _UNKNOWN)
    except (OSError, ValueError, AttributeError):
        return _UNKNOWN


def keep_others(result: Path, beside: Sequence[Path], newer: Measured) -> str | None:
    """Rename a result of another checkpoint, and what belongs to it.

    Args:
        result: The file that says which checkpoint it is of.
        beside: Files and folders that are renamed with it.
        newer: What is to be written there.

    Returns:
        One line that names both, or None where nothing had to be kept.
    """
    older = checkpoint_of(result)
    if not result.exists() or older == newer:
        return None
    label, number = _label(older), 1
    while any(_renamed(path, label).exists() for path in (result, *beside)):
        number += 1
        label = f"{_label(older)}-{number}"
    for path in (result, *beside):
        if path.exists():
            path.rename(_renamed(path, label))
    kept = _renamed(result, label).name
    return f"{result} is now of {_told(newer)}; that of {_told(older)} is kept as {kept}"


def _renamed(path: Path, label: str) -> Path:
    return path.with_name(f"{path.stem}.{label}{path.suffix}")


def _label(of: Measured) -> str:
    if of is None:
        return "untuned"
    return "earlier" if isinstance(of, str) else f"{of.get('num_rounds', 'earlier')}"


def _told(of: Measured) -> str:
    if of is None:
        return "the untuned model"
    if isinstance(of, str):
        return of
    return f"{of.get('path') or 'the model in memory'} (round {of.get('num_rounds')})"
