"""Settings of a run as plain values, and texts without paths of the machine or secrets."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_rlft.core.settings import HIDDEN, without_secrets

__all__ = ["HIDDEN", "Plain", "flat", "told"]

Plain = bool | int | float | str | None
_PATH = re.compile(r"(?:file://)?(?<![\w./:~])~?/(?:[\w.@%+=-]+/)+([\w.@%+=-]*)")
_FILE = re.compile(r"file://(?:[\w.@%+=-]*/)+([\w.@%+=-]*)")
_WINDOWS = re.compile(r"\b[A-Za-z]:[\\/](?:[^\\/\s\"']+[\\/])*([^\\/\s\"']*)")


def flat(config: Mapping[str, Any]) -> dict[str, Plain]:
    """Return a config's settings by key: "model" is its class, "model.lora.rank" an argument.

    Paths are told by their last part, and secrets not at all.
    """
    return {key: _value(key, value) for key, value in _walk(config, "")}


def told(text: str) -> str:
    """Return a text in which paths keep their last part alone, and secrets are hidden."""
    for known in sorted({str(Path.cwd()), str(Path.home())}, key=len, reverse=True):
        if len(known) > 1:
            text = text.replace(f"{known}/", "").replace(f"{known}\\", "")
    text = without_secrets(text)
    for pattern in (_FILE, _PATH, _WINDOWS):
        text = pattern.sub(lambda match: match[1] or "...", text)
    return text


def _walk(value: Any, key: str) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield key, value["class_path"].rpartition(".")[2]
        value = value.get("init_args") or {}
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        if all(isinstance(part, bool | int | float | str) for part in value):
            yield key, ", ".join(map(str, value))
        else:
            for i, part in enumerate(value):
                yield from _walk(part, f"{key}.{i}")
    elif value is None or isinstance(value, bool | int | float | str):
        yield key, value
    else:
        yield key, str(value)


def _value(key: str, value: Plain) -> Plain:
    value = without_secrets(value, key)
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute():
        return told(Path(value).name or "/")
    return told(value)
