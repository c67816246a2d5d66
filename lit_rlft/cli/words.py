"""The words of a command line: options with their values, and names like those one mistyped."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

__all__ = ["Option", "configs_first", "nearest", "options", "rewritten", "with_nulls"]

_DATACLASSES = ("lora", "dial", "reward_workers")
"""Settings of the model that are dataclasses with fields that may be null."""
_NULLS = ("null", "Null", "NULL", "~")


@dataclass(frozen=True)
class Option:
    """An option that has a value.

    Attributes:
        key: Its name, as in "reward.init_args.scale"; without the "+" of what is appended.
        value: Its text.
        place: Number of the word that holds the value.
    """

    key: str
    value: str
    place: int


def options(words: Sequence[str]) -> list[Option]:
    """Return the options of a command line, written as `--key value` or `--key=value`."""
    found = []
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key == "-c":
            key = "--config"
        if not key.startswith("--"):
            continue
        key = key[2:].removesuffix("+")
        if equals:
            found.append(Option(key, value, i))
        elif i + 1 < len(words) and not words[i + 1].startswith("--"):
            found.append(Option(key, words[i + 1], i + 1))
    return found


def configs_first(words: Sequence[str]) -> list[str]:
    """Return a command's words with its configs before its options, each in their own order.

    The parser reads from left to right: a config would undo the options before it.
    """
    configs, others = [], list(words[:1])
    rest = iter(words[1:])
    for word in rest:
        if word in ("--config", "-c"):
            configs += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif word.startswith(("--config=", "-c=")):
            configs.append(word)
        else:
            others.append(word)
    return [*others[:1], *configs, *others[1:]]


def rewritten(words: Sequence[str], option: Option, value: str) -> list[str]:
    """Return the words with another value of an option."""
    result, word = list(words), words[option.place]
    result[option.place] = word[: len(word) - len(option.value)] + value
    return result


def with_nulls(words: Sequence[str]) -> list[str]:
    """Return a command's words with a null in a dataclass as JSON, in which the parser sees it.

    In `--model.lora.rank null` jsonargparse takes it for the text "None".
    """
    result = list(words)
    for option in options(words):
        parent, _, name = option.key.rpartition(".")
        if option.value in _NULLS and parent.rpartition(".")[2] in _DATACLASSES:
            value, joined = json.dumps({name: None}), result[option.place].startswith("--")
            written = [f"--{parent}={value}"] if joined else [f"--{parent}", value]
            result[option.place + 1 - len(written) : option.place + 1] = written
    return result


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names most like a name, as words: "A, B or C"; "" without any."""
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    close = [by_lower[one] for one in get_close_matches(name.lower(), by_lower, 3, 0.5)]
    if not close:
        return ""
    return " or ".join([", ".join(close[:-1]), close[-1]] if close[1:] else close)
