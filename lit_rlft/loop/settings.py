"""The settings of a run as plain values: kept in its checkpoints, compared when it resumes."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lit_rlft.loop.side.rewards import SideReward

__all__ = ["Plain", "arguments", "changes", "settings"]

Plain = bool | int | float | str | None
_MAX_DEPTH = 4
_FOREIGN = ("torch", "lightning", "builtins", "abc")
"""Packages whose own arguments are not settings of a run, but for schedules of a learning rate."""


def settings(value: Any, key: str, leave_out: Sequence[str] = ()) -> dict[str, Plain]:
    """Return what a value is made of by key: plain values, class paths, constructor arguments.

    Of an object: its class under `key` and, under `key.<name>`, the attributes that are called like
    its constructor's arguments, so far as they are plain or made of plain ones.

    Args:
        value: Any object.
        key: Its own key.
        leave_out: Arguments to leave out.
    """
    return dict(_walk(value, key, frozenset(leave_out), _MAX_DEPTH))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of the settings that differ, of both where both have them.

    Where a class differs, its arguments are not compared.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() & new.keys()):
        within = any(key.startswith(f"{other}.") for other, *_ in found)
        if old[key] != new[key] and not within:
            found.append((key, old[key], new[key]))
    return found


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class's constructor, its bases' included."""
    names: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        foreign = base.__module__.partition(".")[0] in _FOREIGN
        if (foreign and not issubclass(base, LRScheduler)) or "__init__" not in vars(base):
            continue
        own = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = {p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        names = {**{n: p for n, p in named.items() if n != "self"}, **names}
    return names


def _walk(value: Any, key: str, without: frozenset[str], depth: int) -> Iterator[tuple[str, Plain]]:
    if value is None or isinstance(value, bool | int | float | str):
        yield key, value
    elif isinstance(value, Path):
        yield key, str(value)
    elif depth == 0:
        return
    elif isinstance(value, Mapping | nn.ModuleDict):
        for name, part in value.items():
            if str(name) not in without:
                yield from _walk(part, f"{key}.{name}", frozenset(), depth - 1)
    elif isinstance(value, list | tuple | nn.ModuleList):
        yield f"{key}.length", len(value)
        for i, part in enumerate(value):
            yield from _walk(part, f"{key}.{i}", frozenset(), depth - 1)
    elif isinstance(value, partial):
        yield from _walk(value.func, key, frozenset(), depth)
        yield from _walk(value.keywords, key, without, depth)
    elif isinstance(value, type) or inspect.isroutine(value):
        yield key, _path(value)
    elif isinstance(value, SideReward):
        yield from _walk(value.inner, key, without, depth)
    else:
        yield key, _path(type(value))
        for name, part in _attributes(value).items():
            if name not in without:
                yield from _walk(part, f"{key}.{name}", frozenset(), depth - 1)


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's attributes that are called like its constructor's arguments."""
    own = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        own |= dict(value.named_children())
    return {name: own[name] for name in arguments(type(value)) if name in own}


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"
