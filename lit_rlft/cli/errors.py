"""Errors as sentences, with the keys that a user typed or can type."""

from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_rlft.core.checks import BadArgument, UsageError

__all__ = ["sentence"]

_PLAIN = {
    "Architecture": "pipeline.init_args.architecture",
    "FixedPoint": "model.init_args.solver",
    "LoRA": "model.init_args.lora",
    "Sampler": "model.init_args.sampler",
}
"""Where the settings of classes are that have no class path in a config."""


def sentence(error: Exception, config: Namespace | None = None) -> str | None:
    """Return one sentence for an error that the user can fix, None for any other.

    Parsing wraps errors: the innermost one says what is wrong.

    Args:
        error: What was raised.
        config: Of the command, if it was parsed: an argument is then named by its key there.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, BadArgument) and config is not None:
            return _with_key(cause, config)
        if isinstance(cause, UsageError):
            return str(cause)
    if not isinstance(error, ArgumentError | MisconfigurationException):
        return None
    # The innermost of these says what the parser's list of all alternatives buries.
    texts = [str(error), *(t for t in map(str, causes) if t.startswith("Problem with given class"))]
    return " ".join(texts[-1].split())


def _with_key(error: BadArgument, config: Namespace) -> str:
    """Return an argument's problem under its key, or under its class where it has no key."""
    found = [key for key, name in _classes(config.as_dict()) if name == error.owner]
    prefix = found[0] if found else _PLAIN.get(error.owner)
    return str(error) if prefix is None else f"{prefix}.{error.argument} {error.problem}"


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over the keys of init_args in a config and the names of their classes."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str):
            yield f"{key}.init_args", path.rpartition(".")[2]
    elif not isinstance(value, list):
        return
    parts = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, part in parts:
        yield from _classes(part, f"{key}.{name}" if key else str(name))
