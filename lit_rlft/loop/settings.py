"""The settings of two runs, compared."""

from collections.abc import Iterator, Mapping
from typing import Any

from lit_rlft.core.settings import without_secrets

__all__ = ["ABSENT", "changes"]


class _Absent:
    def __str__(self) -> str:
        return "not set"

    __repr__ = __str__


ABSENT: Any = _Absent()
"""Stands for the value of a setting that one side does not have."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of the settings that differ; ABSENT where one has none.

    Where a class differs, its arguments are not compared. What one side alone has below an argument
    counts where the other side knows that argument: other versions have other arguments.
    """
    old = without_secrets(old)  # those of an earlier version's checkpoint are not hidden
    known = set(_prefixes(old)), set(_prefixes(new))
    by_name = {_length_of_named(key) for key in known[0] | known[1]}
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, ABSENT), new.get(key, ABSENT)
        within = any(key.startswith(f"{other}.") for other, *_ in found)
        if before == now or within or key in by_name:
            continue
        if ABSENT not in (before, now) or _is_news(key, old, new, known):
            found.append((key, before, now))
    return found


def _is_news(
    key: str, old: Mapping[str, Any], new: Mapping[str, Any], known: tuple[set[str], set[str]]
) -> bool:
    """Return whether a key of one side alone lies below an argument that both sides know."""
    parts = key.split(".")
    if parts[-1] == "length":
        return False  # said by what it is the length of
    ancestors = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    owner = next((one for one in ancestors if one in old or one in new), None)
    if owner is None or old.get(owner, ABSENT) != new.get(owner, ABSENT):
        return False
    argument = ".".join(parts[: owner.count(".") + 2])
    return argument in known[0] and argument in known[1]


def _length_of_named(key: str) -> str:
    """Return the key of the length of what has a part by name, "" for what is in a list.

    Such a length says nothing that its parts do not say.
    """
    parent, _, last = key.rpartition(".")
    return "" if last.isdigit() or last == "length" else f"{parent}.length"


def _prefixes(keys: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over all keys, and over what lies above them."""
    for key in keys:
        parts = key.split(".")
        yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
