"""Warnings that a run gives, kept in its folder."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["WARNINGS", "Heard", "hearing_warnings"]

WARNINGS = "report/warnings.jsonl"
"""Within a run's folder: a line of JSON for each, with `stage` and `message`."""


class Heard:
    """The warnings of one command, each once; written down as soon as the folder is known.

    Attributes:
        messages: Their texts, in order.
        latest: Of the command that runs, None outside of commands.
    """

    latest: ClassVar["Heard | None"] = None

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._path: Path | None = None
        self._stage, self._written = "", 0

    def hear(self, message: str) -> None:
        """Take a warning; one that was heard before is left out."""
        text = " ".join(message.split())
        if text and text not in self.messages:
            self.messages.append(text)
            self._write()

    def keep_in(self, folder: Path, stage: str) -> None:
        """Write those heard so far and all further ones into a run's folder.

        Args:
            folder: The run's.
            stage: Which command it is.
        """
        self._path, self._stage = folder / WARNINGS, stage
        self._write()

    def _write(self) -> None:
        if self._path is None or self._written == len(self.messages):
            return
        new = self.messages[self._written :]
        self._written = len(self.messages)
        lines = [json.dumps({"stage": self._stage, "message": text}) for text in new]
        with suppress(OSError):  # a warning must not end what it warns of
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))


@contextmanager
def hearing_warnings() -> Iterator[Heard]:
    """Hear the warnings that Python shows within the block, on the first process."""
    from lit_rlft.runs.agreement import is_first  # seconds, which who reads a run need not wait

    heard, show, before = Heard(), warnings.showwarning, Heard.latest
    first = is_first()

    def hear(message: Warning | str, *args: Any, **settings: Any) -> None:
        if first:
            heard.hear(str(message))
        show(message, *args, **settings)

    warnings.showwarning = hear
    Heard.latest = heard
    try:
        yield heard
    finally:
        Heard.latest = before
        if warnings.showwarning is hear:
            warnings.showwarning = show
