"""JSON files larger than memory: one entry of an array after the other, by the standard library.

COCO files hold everything in one object of long arrays, so that `json.load` needs about ten times
the file's size. Here the decoder is given a window of the text, and gets more where an entry does
not end in it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.files import encoding

__all__ = ["JSONStream"]

_CHUNK = 1 << 20  # characters read at a time
_BLANKS = " \t\r\n"
_ENDS = frozenset(",:]}" + _BLANKS)


class JSONStream:
    """Reads an object of arrays entry by entry, within a `with` block.

        with JSONStream(path) as stream:
            for key in stream.keys():
                for entry in stream.entries():
                    ...

    The entries of every key must be read to the end, or left out with `skip`.

    Args:
        path: The file.
        chunk: Characters read at a time.

    Raises:
        UsageError: While reading: the file ends too early, is no text or no such JSON; the sentence
            says after how many entries of which key.
    """

    def __init__(self, path: Path, chunk: int = _CHUNK) -> None:
        self.path, self.chunk = path, chunk
        self._decoder = json.JSONDecoder()
        self._text, self._place, self._ended = "", 0, False
        self._key, self._num_entries = "", 0

    def __enter__(self) -> Self:
        """Open the file."""
        self._file = self.path.open(encoding=encoding(self.path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> Iterator[str]:
        """Iterate over the keys of the outer object; read or skip each value in between."""
        if self._next() != "{":
            what = "list" if self._next() == "[" else "text or number"
            raise UsageError(
                f"{self.path} is a {what}, not a COCO file, and cannot be read as one; give an "
                "object with images, annotations and categories"
            )
        self._expect("{")
        while self._next() != "}":
            self._key, self._num_entries = str(self._value()), 0
            self._expect(":")
            yield self._key
            if self._next() == ",":
                self._place += 1
        self._expect("}")

    def entries(self) -> Iterator[Any]:
        """Iterate over the entries of the array that is the current key's value."""
        self._expect("[")
        while self._next() != "]":
            yield self._value()
            self._num_entries += 1
            if self._next() == ",":
                self._place += 1
        self._expect("]")

    def skip(self) -> None:
        """Pass over the current key's value; an array entry by entry."""
        if self._next() == "[":
            for _ in self.entries():
                pass
        else:
            self._value()

    def _value(self) -> Any:
        """Decode the next value; read on where it does not end in the window."""
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if not self._read():
                    raise self._broken() from error
                continue
            # What looks like the end of a number may be the end of the window.
            if self._text[end : end + 1] in _ENDS or not self._read():
                self._place = end
                return value

    def _expect(self, mark: str) -> None:
        if self._next() != mark:
            raise self._broken()
        self._place += 1

    def _next(self) -> str:
        """Return the next character that is not blank, without passing it."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANKS:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                raise self._broken()

    def _read(self) -> bool:
        """Move the window on; return whether there was more."""
        try:
            more = "" if self._ended else self._file.read(self.chunk)
        except UnicodeError as error:
            raise UsageError(
                f"{self.path} cannot be read as text ({error}); save it as UTF-8"
            ) from error
        self._ended = not more
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def _broken(self) -> UsageError:
        where = f"after {self._num_entries} entries of {self._key!r}" if self._key else "at once"
        # At the end of the file, what cannot be decoded lacks its own end.
        what = "is cut off" if self._ended else "cannot be read"
        return UsageError(
            f"{self.path} {what} {where}; any of its layouts may lack elements, so none is used: "
            "get the whole file"
        )
