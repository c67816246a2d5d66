"""Preference files: which of two samples somebody prefers, as JSON lines.

A line is one comparison of two samples of one condition::

    {"condition": {"prompt": "a red fox"}, "chosen": "samples/07.png", "rejected": "samples/02.png"}

condition: the record that `samples.jsonl` of `lit-rlft predict` has of a sample, without seed,
    rewards, file and checkpoint: `{"prompt": ...}`, `{"num_atoms": 9}`, `{"task": ..., "given":
    [...]}`. A text stands for `{"prompt": text}`. Absent where the domain has one condition.
chosen: the preferred sample: the path of its file, relative to the preference file, or the sample
    itself where the domain has a form for that.
rejected: the other sample, likewise.
tie: `true` where neither is preferred; readers leave the line out. May be absent.
voter: who or what preferred it, a text. May be absent.
seed: of the round or the draw, an integer. May be absent.
time: when, a text in ISO 8601. May be absent.

Half a line at the end, where a program was killed as it wrote, is left out.

Nobody reads further keys. Files of samples are those that `lit-rlft predict` writes: `.png` (also
`.jpg`, `.webp`) for pictures, `.json` for layouts and points, `.sdf` (also `.xyz`) for molecules.
In the line itself a layout is the object that its `.json` holds, a point is a list of numbers, and
a molecule is `{"symbols": ["C", ...], "positions": [[x, y, z], ...]}` in Angstrom.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlft.core.checks import UsageError, from_json
from lit_rlft.kit.files import encoding, existing

__all__ = ["Pair", "preference_line", "read_preferences"]

_MAX_LISTED = 5
"""Bad lines in a message."""
_MAX_SHOWN = 80
"""Characters of a path in a message."""


class Pair(NamedTuple):
    """A line of a preference file.

    Attributes:
        condition: The condition's record.
        chosen: The preferred sample, a path relative to `folder` or the sample itself.
        rejected: The other one.
        folder: The preference file's folder.
        line: Its number there, from 1.
        voter: Who preferred it, or None.
    """

    condition: Mapping[str, Any]
    chosen: Any
    rejected: Any
    folder: str
    line: int
    voter: str | None = None


def read_preferences(path: Path) -> list[Pair]:
    """Return the comparisons of a preference file that are no ties, in its order.

    Raises:
        UsageError: The file is missing or has no comparison; or lines are bad: the sentence has the
            first few with their numbers, keys and what to do.
    """
    pairs, faults, num_ties = [], [], 0
    # JSON lines end in "\n" alone; texts may hold other line ends.
    text = existing(path).read_text(encoding=encoding(path), errors="replace")
    *lines, last = text.split("\n")
    for number, line in enumerate([*lines, *([] if _torn(last) else [last])], 1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            pair = _pair(record, path.parent, number)
        except _Bad as bad:
            faults.append(f"line {number}: {bad}")
            continue
        if record.get("tie", False):
            num_ties += 1
        else:
            pairs.append(pair)
    check_lines(path, faults)
    if not pairs:
        others = f" but {num_ties} ties" if num_ties else ""
        raise UsageError(
            f"{path} has no comparisons{others}; write one a line, "
            '{"condition": ..., "chosen": ..., "rejected": ...}'
        )
    return pairs


def preference_line(
    condition: Mapping[str, Any], chosen: Any, rejected: Any, **further: Any
) -> str:
    """Return the line of a comparison, with its end.

    Args:
        condition: The condition's record.
        chosen: The preferred sample: its path relative to the file, or the sample itself.
        rejected: The other one.
        **further: `voter`, `seed`, `time`, or `tie=True`; what is None is left out.
    """
    record = {"condition": dict(condition), "chosen": chosen, "rejected": rejected}
    record |= {name: value for name, value in further.items() if value is not None}
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def check_lines(path: Path, faults: list[str]) -> None:
    """Raise UsageError where a preference file has faults, each "line <number>: <sentence>"."""
    if not faults:
        return
    rest = len(faults) - _MAX_LISTED
    more = f"; and {rest} more bad lines" if rest > 0 else ""
    raise UsageError(f"{path}: {'; '.join(faults[:_MAX_LISTED])}{more}")


def _torn(last: str) -> bool:
    """Return whether what follows the last line's end is half of a line, as a kill leaves it."""
    try:
        from_json(last)
    except ValueError:
        return True
    return False


class _Bad(Exception):
    """What is wrong with a line, and what to do."""


def _record(line: str) -> dict[str, Any]:
    try:
        record = from_json(line)
    except ValueError as error:
        raise _Bad(f"it is no JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise _Bad(f"it is a JSON {type(record).__name__}; write an object with chosen, rejected")
    return record


def _pair(record: dict[str, Any], folder: Path, number: int) -> Pair:
    condition = record.get("condition", {})
    if isinstance(condition, str):
        condition = {"prompt": condition}
    if not isinstance(condition, dict):
        raise _Bad('condition must be an object, such as {"prompt": "a red fox"}, or a text')
    for key in ("chosen", "rejected"):
        _check_sample(record, key, folder)
    if record["chosen"] == record["rejected"]:
        raise _Bad("chosen and rejected are the same sample; take the line out")
    for key, kind in (("tie", bool), ("voter", str)):
        if not isinstance(record.get(key), kind | None):
            word = "true or false" if kind is bool else "a text"
            raise _Bad(
                f"{key} must be {word}, got {json.dumps(record[key])}; leave it out if unknown"
            )
    samples = record["chosen"], record["rejected"]
    return Pair(condition, *samples, str(folder), number, record.get("voter"))


def _check_sample(record: Mapping[str, Any], key: str, folder: Path) -> None:
    sample = record.get(key)
    if sample is None or sample == "":
        raise _Bad(f"it has no {key}; give the path of the sample's file, or the sample itself")
    if isinstance(sample, bool | int | float):
        raise _Bad(f"{key} is {sample}; give the path of the sample's file, or the sample itself")
    if isinstance(sample, str) and not _is_file(folder / sample):
        raise _Bad(
            f"{key} names {sample[:_MAX_SHOWN]!r}, but {folder} has no such file; paths are "
            "relative to the preference file"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no path at all, such as a layout's JSON as a text
        return False
