"""Errors that the user can fix, and the checks of settings that all classes share."""

import inspect
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import FunctionType
from typing import Any, get_args, get_type_hints

__all__ = [
    "NO_SUPER",
    "BadArgument",
    "UsageError",
    "at_least",
    "below_one",
    "finite",
    "from_json",
    "hints",
    "loading",
    "of_kind",
    "one_of",
    "positive",
    "reading",
    "require",
    "told",
    "within",
]

NO_SUPER = "{}: its __init__ must begin with super().__init__()"
"""On a class whose `__init__` leaves out that of its base."""
_LONGEST = 200
"""Characters of a reason that a reader of files gives."""
_OWN = object()
"""Stands for the owner's attribute."""


class UsageError(ValueError):
    """Settings or input that cannot work; the message names the key and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


class BadArgument(UsageError):
    """An argument with an impossible value: "TopK: k must be at least 1, got 0".

    The command line writes the argument's key in the config in place of class and argument.

    Args:
        owner: Whose argument it is: an instance, a class or a function.
        argument: Its name.
        problem: What is wrong with it, and what to do.
    """

    def __init__(self, owner: object, argument: str, problem: str) -> None:
        kind = owner if isinstance(owner, type | FunctionType) else type(owner)
        self.owner, self.argument, self.problem = kind.__name__, argument, problem
        super().__init__(f"{self.owner}: {argument} {problem}")


def require(holds: bool, owner: object, argument: str, rule: str) -> None:
    """Raise BadArgument, "<class of owner>: <argument> must be <rule>", unless the rule holds."""
    if not holds:
        raise BadArgument(owner, argument, f"must be {rule}")


def finite(owner: object, *names: str, **values: Any) -> None:
    """Raise BadArgument unless settings of a class are finite numbers.

    Here and in the checks below settings are given by the names of the owner's attributes, or with
    their values. None passes, and of a list or a mapping each number is checked. One that the
    owner's constructor annotates as a whole number has to be one.
    """
    _each(owner, names, values, lambda value: True, "a finite number")


def positive(owner: object, *names: str, **values: Any) -> None:
    """Raise BadArgument unless settings are above 0 and finite."""
    _each(owner, names, values, lambda value: value > 0, "positive")


def at_least(low: float, owner: object, *names: str, **values: Any) -> None:
    """Raise BadArgument unless settings are `low` or more and finite."""
    _each(owner, names, values, lambda value: value >= low, f"at least {low}")


def within(low: float, high: float, owner: object, *names: str, **values: Any) -> None:
    """Raise BadArgument unless settings lie in [low, high]."""
    _each(owner, names, values, lambda value: low <= value <= high, f"in [{low}, {high}]")


def below_one(owner: object, *names: str, **values: Any) -> None:
    """Raise BadArgument unless settings are shares that leave something: in [0, 1)."""
    _each(owner, names, values, lambda value: 0 <= value < 1, "in [0, 1)")


def one_of(
    owner: object, name: str, kinds: Iterable[Any], given: Any = _OWN, others: str | None = None
) -> None:
    """Raise BadArgument unless a setting is one of a few values: "A: x is 'd'; use 'b' or 'c'".

    Args:
        owner: Whose setting it is.
        name: Its name.
        kinds: What it may be.
        given: Its value; the owner's attribute of that name unless given.
        others: What else it may be, such as "a whole number"; only words are then checked.
    """
    kinds = list(kinds)
    known = [*map(repr, kinds), *([] if others is None else [others])]
    use = f"{', '.join(known[:-1])} or {known[-1]}" if known[:-1] else known[-1]
    value = getattr(owner, name) if given is _OWN else given
    right = any(isinstance(value, type(kind)) and value == kind for kind in kinds)
    if not right and (others is None or isinstance(value, str)):
        raise BadArgument(owner, name, f"is {value!r}; use {use}")


def of_kind(
    owner: object, name: str, kind: type | tuple[type, ...], remedy: str, given: Any = _OWN
) -> None:
    """Raise BadArgument unless a part is of a kind: "GRAFT: sampler is 20; <remedy>".

    Args:
        owner: What it is a part of.
        name: The argument's name.
        kind: A class, or several.
        remedy: What to give. Of a class where an instance is wanted, the remedy is to call it.
        given: The part; the owner's attribute of that name unless given.
    """
    value = getattr(owner, name) if given is _OWN else given
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        remedy = f"write {value.__name__}()"
    raise BadArgument(owner, name, f"is {told(value)}; {remedy}")


def told(value: object) -> str:
    """Say what a value is where another kind was expected: itself if it is short, or its kind."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return "a function"
    if value is None or isinstance(value, int | float | str):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


@cache
def hints(kind: type) -> Mapping[str, Any]:
    """Return the annotations of a class's constructor by argument, its bases' included."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        with suppress(Exception):  # some name what only type checkers import
            found = get_type_hints(vars(base).get("__init__")) | found
    return found


def _is_whole(owner: object, name: str) -> bool:
    """Return whether a constructor annotates the numbers of an argument as whole ones."""
    kinds = set(_leaves(hints(owner if isinstance(owner, type) else type(owner)).get(name)))
    return int in kinds and float not in kinds


def _leaves(hint: Any) -> Iterator[Any]:
    """Iterate over the types that an annotation is made of."""
    yield hint
    for part in get_args(hint):
        yield from _leaves(part)


def _each(
    owner: object,
    names: tuple[str, ...],
    values: Mapping[str, Any],
    holds: Callable[[float], bool],
    rule: str,
) -> None:
    for name, given in {**{name: getattr(owner, name) for name in names}, **values}.items():
        whole = _is_whole(owner, name)
        for value in _numbers(given):
            right = not whole or isinstance(value, numbers.Integral)
            require(right, owner, name, f"a whole number, got {value}")
            # An integer may be larger than any float.
            known = isinstance(value, int) or math.isfinite(value)
            require(known and holds(value), owner, name, f"{rule}, got {value}")


def _numbers(value: Any) -> Iterator[float]:
    """Iterate over the numbers in a setting; a word, such as the name of a preset, has none."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


def from_json(text: str | bytes) -> Any:
    """Return what a text of JSON holds.

    Raises:
        ValueError: It is no JSON, or lists in it lie deeper in each other than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects lie too deep in each other") from None


@contextmanager
def loading(sentence: str) -> Iterator[None]:
    """Turn any error while reading a user's file into UsageError, "<sentence> (<reason>)".

    Long reasons lose their middle: readers of files have some of several hundred characters.

    A UsageError raised in the block stays as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a file can hold anything, and every reader has its own errors
        raise UsageError(f"{sentence} ({_reason(error)})") from error


@contextmanager
def reading(owner: object, argument: str) -> Iterator[None]:
    """Turn UsageError on data or a network into BadArgument, which names the setting that gave it.

    A message that names the argument first, "<argument>: ...", is not told to be of no use.
    """
    try:
        yield
    except BadArgument:
        raise
    except UsageError as error:
        said = str(error)
        named = said.removeprefix(f"{argument}: ")
        problem = named if named != said else f"cannot be used: {said}"
        raise BadArgument(owner, argument, problem) from error


def _reason(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    if type(error).__name__ == "SafetensorError":
        reason = ": ".join(reason.split(": ")[:2])  # without the place in the file's header
    half = _LONGEST // 2  # where the start says what failed, and the end what is missing
    return reason if len(reason) <= _LONGEST else f"{reason[:half]} ... {reason[-half:]}"
