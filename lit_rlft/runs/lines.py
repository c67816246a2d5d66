"""Files of JSON lines that grow, are killed in between, and are read all the while."""

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_rlft.core.checks import from_json
from lit_rlft.runs.files import writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["append_lines", "locked", "read_lines", "signature", "without_nan"]

_PAUSE = 0.05
"""Seconds between two tries to take a lock, where the system cannot wait for one."""


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines; they are on the disk when this returns.

    What a killed process left of a last line is removed first.

    Raises:
        DiskError: The disk takes no more.
    """
    if not lines:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            _remove_torn_line(file)
            _write_all(file, lines.encode())
            os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a file; a last line without an end is not there yet.

    Lines that are no objects are left out: a machine that lost its power may leave some.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole, _, _ = content.rpartition(b"\n")
    for line in whole.splitlines():
        try:
            found = from_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def signature(path: Path) -> tuple[int, int, int]:
    """Return what changes whenever a file does; zeros where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file's lock for the block; it ends with the process, however that ends.

    Raises:
        BlockingIOError: Another process holds it, and this one does not `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> None:
    if sys.platform == "win32":
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                return
            except OSError as error:
                if not wait:
                    raise BlockingIOError("another process holds the lock") from error
            time.sleep(_PAUSE)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_torn_line(file: IO[bytes]) -> None:
    size = os.fstat(file.fileno()).st_size
    end = size
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end != size:
        file.truncate(end)


def _write_all(file: IO[bytes], content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def without_nan(value: Any) -> Any:
    """Return what JSON can hold: numbers that are NaN or infinite become null."""
    if isinstance(value, Mapping):
        return {key: without_nan(own) for key, own in value.items()}
    if isinstance(value, list):
        return [without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
