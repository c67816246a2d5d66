"""The settings of a run as plain values: what its objects are made of, and were made from."""

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["HIDDEN", "Plain", "Recorded", "arguments", "settings", "without_secrets"]

Plain = bool | int | float | str | None
_MAX_DEPTH = 4
_MOST = 256
"""Values of one argument that are kept one by one; of more, as of a list of prompts, a digest."""
_FOREIGN = ("torch", "lightning", "builtins", "abc")
"""Packages whose arguments are no settings of a run, except learning-rate schedules'."""
_RECORD = "_constructed_from"

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"(^|[._-])(token|secret|passw(or)?d|api_?key|access_?key|authori[sz]ation|credentials?)$",
    re.IGNORECASE,
)
"""Names of settings whose values are nobody's business; `num_tokens` is none of them."""
_SECRETS = (
    (re.compile(r"\b(hf|ghp|gho)_[A-Za-z0-9]{12,}\b"), HIDDEN),
    (re.compile(r"\b(github_pat_|glpat-|xox[bp]-)[\w-]{10,}"), HIDDEN),
    (re.compile(r"\bsk-[\w-]{16,}"), HIDDEN),
    (re.compile(r"(?<=://)[^\s/@]+@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)([?&]\w*(?:token|key|secret|passw(?:or)?d)=)[^&\s\"']+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer )(?=\S*\d)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
)
"""What looks like a secret in any text, and what takes its place."""


class Recorded:
    """An object that remembers what its constructor was given, as plain values.

    Attributes alone do not tell: many objects keep what they make of an argument, under another
    name. What Python cannot tell of a constructor's arguments is left out.
    """

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise TypeError(f"{cls.__name__}() takes no arguments")
        made = super().__new__(cls)
        vars(made)[_RECORD] = _record(cls, args, kwargs)
        return made

    @property
    def stands_for(self) -> object:
        """The object whose settings are meant: itself, unless it takes the place of another."""
        return self


def settings(value: Any, key: str, leave_out: Sequence[str] = ()) -> dict[str, Plain]:
    """Return what a value is made of by key: plain values, class paths, constructor arguments.

    Of an object: its class under `key` and, under `key.<name>`, its constructor's arguments, so far
    as they are plain or made of plain ones: attributes that are called like them, and where there
    are none what the constructor was given (`Recorded`). Secrets are hidden.

    Args:
        value: Any object.
        key: Its own key.
        leave_out: Arguments to leave out.
    """
    found = _walk(value, key, frozenset(leave_out), _MAX_DEPTH)
    return {name: without_secrets(plain, name) for name, plain in found}


def without_secrets(value: Any, key: str = "") -> Any:
    """Return a text, a plain value, or lists and mappings of them, in which secrets are hidden.

    Args:
        value: The value.
        key: Its name: `token` and the like hide all of it.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part, key) for part in value]
    if value and _SECRET.search(key):
        return HIDDEN
    if isinstance(value, str):
        for pattern, instead in _SECRETS:
            value = pattern.sub(instead, value)
    return value


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class's constructor, its bases' included."""
    names: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        foreign = base.__module__.partition(".")[0] in _FOREIGN
        if (foreign and not issubclass(base, LRScheduler)) or "__init__" not in vars(base):
            continue
        own = _parameters(vars(base)["__init__"]).values()
        named = {p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        names = {**{n: p for n, p in named.items() if n != "self"}, **names}
    return names


def _parameters(constructor: Any) -> Mapping[str, inspect.Parameter]:
    """Return a constructor's parameters; none of one that is not written in Python."""
    try:
        return inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return {}


def _record(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Plain]:
    """Return a constructor's arguments, given or by default, as plain values by key."""
    parameters = _parameters(cls.__init__)  # type: ignore[misc]
    known = {n: p.default for n, p in arguments(cls).items() if p.default is not p.empty}
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) and args:
        known = {n: value for n, value in known.items() if n in parameters}  # some is given in them
    try:
        bound = inspect.Signature([*parameters.values()]).bind_partial(None, *args, **kwargs)
    except TypeError:  # which the constructor says itself
        return {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            known |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            known[name] = value
    found: dict[str, Plain] = {}
    for name, value in known.items():
        found |= _shortened(name, dict(_walk(value, name, frozenset(), _MAX_DEPTH - 1)))
    return found


def _shortened(name: str, found: dict[str, Plain]) -> dict[str, Plain]:
    if len(found) <= _MOST:
        return found
    digest = hashlib.blake2b(repr(sorted(found.items())).encode(), digest_size=8).hexdigest()
    return {name: f"{len(found)} values of digest {digest}"}


def _walk(value: Any, key: str, without: frozenset[str], depth: int) -> Iterator[tuple[str, Plain]]:
    if value is None or isinstance(value, bool | int | float | str):
        yield key, value
    elif isinstance(value, Path):
        yield key, str(value)
    elif depth == 0:
        return
    elif isinstance(value, Mapping | nn.ModuleDict):
        yield f"{key}.length", len(value)
        for name, part in value.items():
            if str(name) not in without:
                yield from _walk(part, f"{key}.{name}", frozenset(), depth - 1)
    elif isinstance(value, list | tuple | nn.ModuleList):
        yield f"{key}.length", len(value)
        for i, part in enumerate(value):
            yield from _walk(part, f"{key}.{i}", frozenset(), depth - 1)
    elif isinstance(value, partial):
        yield from _walk(value.func, key, frozenset(), depth)
        for name, part in value.keywords.items():
            if name not in without:
                yield from _walk(part, f"{key}.{name}", frozenset(), depth - 1)
    elif isinstance(value, type) or inspect.isroutine(value):
        yield key, _path(value)
    elif isinstance(value, Recorded) and value.stands_for is not value:
        yield from _walk(value.stands_for, key, without, depth)
    else:
        yield key, _path(type(value))
        yield from _walk_arguments(value, key, without, depth - 1)


def _walk_arguments(
    value: Any, key: str, without: frozenset[str], depth: int
) -> Iterator[tuple[str, Plain]]:
    record: dict[str, dict[str, Plain]] = {}
    for name, plain in getattr(value, "__dict__", {}).get(_RECORD, {}).items():
        record.setdefault(name.partition(".")[0], {})[name] = plain
    attributes = _attributes(value)
    for name, part in attributes.items():
        if name not in without:
            found = dict(_walk(part, f"{key}.{name}", frozenset(), depth))
            yield from found.items()
            made_of = [*record.get(name, {}).values()]
            # As a tensor that was made of numbers: its class says nothing of them.
            if [*found.values()] == [_path(type(part))] != made_of:
                for given, plain in record.get(name, {}).items():
                    yield f"{key}.{name}.given{given.removeprefix(name)}", plain
    for name in record:
        if name not in attributes and name not in without:
            yield from ((f"{key}.{given}", plain) for given, plain in record[name].items())


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's attributes that are called like its constructor's arguments."""
    own = dict(getattr(value, "__dict__", {}))
    slots = {name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())}
    own |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    if isinstance(value, nn.Module) and "_modules" in vars(value):  # its base's __init__ has run
        own |= dict(value.named_children())
    return {name: own[name] for name in arguments(type(value)) if name in own}


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"
