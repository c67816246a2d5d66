"""Files that are written whole or not at all, and sentences for disks that take no more."""

import contextlib
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_rlft.core.checks import UsageError, told

__all__ = [
    "PARTIAL",
    "DiskError",
    "clean",
    "disk_trouble",
    "no_paths",
    "whole",
    "write_folder",
    "write_whole",
    "writing",
]

PARTIAL, _OLD = ".partial", ".old"
"""Endings of a file that is being written, and of a folder that is being replaced."""

_TRIES, _PAUSE = 20, 0.1
"""Tries to replace a file on Windows, and the seconds between two."""

_TROUBLES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed (see `ulimit -f`)",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MESSAGES = {
    "os error 28": errno.ENOSPC,
    "os error 122": errno.EDQUOT,
    "os error 27": errno.EFBIG,
    "os error 5)": errno.EIO,
    "os error 30": errno.EROFS,
    "No space left on device": errno.ENOSPC,
    "PytorchStreamWriter failed": errno.ENOSPC,
    "iostream error": errno.ENOSPC,
}
"""What libraries say that raise errors of their own: safetensors, and torch's writer."""


class DiskError(UsageError):
    """A file could not be written; the message names it, the free space and the remedy."""


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write a file so that a reader, or a run killed in between, sees the old or the new one.

    Raises:
        OSError: It cannot be written; the old one, if any, is as it was.
    """
    with whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, which takes its place at the end of the block.

    It is on the disk by then, so that a power failure leaves the old or the new file too.

    Raises:
        OSError: It cannot be written; the old one, if any, is as it was.
        UsageError: A folder stands in its place.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, where a file is to be written; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as raw:
            file = _Recorded(raw)
            try:
                yield file  # type: ignore[misc]
            except Exception as error:
                # What writes may hide the reason: torch's archives end with errors of their own.
                raise file.error or error from None
            raw.flush()
            os.fsync(raw.fileno())
        _replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _replace(new: Path, path: Path) -> None:
    """Give a file or folder another name; Windows refuses while somebody has one of them open."""
    if sys.platform != "win32":
        os.replace(new, path)
        return
    for _ in range(_TRIES):
        try:
            os.replace(new, path)
            return
        except PermissionError:
            time.sleep(_PAUSE)
    raise DiskError(
        f"{new} cannot become {path}, as another program has one of them open; close it there, "
        "then run the same command again"
    )


def write_folder(folder: Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Write a folder beside `folder`, then swap them; return where the files are.

    Args:
        folder: Its earlier content goes, if the new one has been written.
        write: Writes into the folder it is given, and returns what it wrote.

    Raises:
        OSError: It cannot be written; the earlier folder is as it was.
    """
    partial, old = (folder.with_name(f"{folder.name}{ending}") for ending in (PARTIAL, _OLD))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = write(partial)
        for file in filter(Path.is_file, partial.rglob("*")):
            _sync(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed in the last line
        _replace(folder, old)
    if any(partial.iterdir()):
        _replace(partial, folder)
    else:
        partial.rmdir()
    shutil.rmtree(old, ignore_errors=True)
    return [folder / path.relative_to(partial) for path in written]


def no_paths(answer: Any, method: str) -> str | None:
    """Return what is wrong with the answer of a method that returns the paths that it wrote.

    Args:
        answer: What it returned.
        method: Its name, such as "Mine.export".
    """
    given = told(answer)
    if isinstance(answer, list | tuple):
        others = [told(path) for path in answer if not isinstance(path, Path)]
        if not others:
            return None
        given += f" with {others[0]}"
    return f"{method} returned {given}; it returns the paths that it wrote"


def clean(folder: Path) -> None:
    """Remove what a run that was killed while it wrote left in its folder.

    Only the run that holds the folder's lock may do so: another's writing would fail.
    """
    old = folder / f"tuned{_OLD}"
    if old.is_dir() and not (folder / "tuned").exists():
        old.replace(folder / "tuned")  # killed between the two steps of a swap
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder / f"tuned{PARTIAL}", ignore_errors=True)
    for pattern in ("config.yaml", "checkpoints/*.ckpt", "panels/*.png"):
        for partial in folder.glob(f"{pattern}{PARTIAL}"):
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path | str, remedy: str = "then run the same command again") -> Iterator[None]:
    """Turn a disk that takes no more into one sentence.

    Args:
        path: What the block writes.
        remedy: What to do once there is room: "make room there, <remedy>".

    Raises:
        DiskError: The block failed because the disk is full, read-only or broken.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        problem = disk_trouble(error, path, remedy)
        if problem is None:
            raise
        raise DiskError(problem) from error


def disk_trouble(error: BaseException, path: Path | str, remedy: str) -> str | None:
    """Return one sentence where an error, or what led to it, is a disk's; None for others.

    Args:
        error: What was raised.
        path: What was being written, unless the error says.
        remedy: What to do once there is room.
    """
    for one in _chain(error):
        if isinstance(one, DiskError):  # closing other files may have failed after it
            return str(one)
    number, named = _number(error)
    if number is None:
        return None
    path = Path(named or path)
    free = _free(path)
    space = f" ({free} free)" if free else ""
    first = "make room there" if number in _FULL else "fix that"
    return f"{path}: {_TROUBLES[number]}{space}; {first}, {remedy}"


def _number(error: BaseException) -> tuple[int | None, str | None]:
    """Return the number of the first disk trouble in an error's chain, and the file it names."""
    for one in _chain(error):
        text = str(one)
        if isinstance(one, OSError) and one.errno in _TROUBLES:
            return one.errno, one.filename if isinstance(one.filename, str) else None
        if isinstance(one, OSError) and one.errno is None and "written" in text:
            return errno.ENOSPC, None  # numpy: "1000 requested and 512 written"
        for words, number in _MESSAGES.items():
            if words in text and not isinstance(one, UsageError):
                return number, None
    return None, None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and all that led to it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            queue += [one.__cause__, one.__context__]


def _free(path: Path) -> str:
    """Return the free space where a path is or would be, "" where nobody can tell."""
    for folder in (path, *path.absolute().parents):
        try:
            size = float(shutil.disk_usage(folder).free)
        except OSError:
            continue
        for unit in ("B", "kB", "MB"):
            if size < 1000:
                return f"{size:.3g} {unit}"
            size /= 1000
        return f"{size:,.3g} GB"
    return ""


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Recorded(io.RawIOBase):
    """Writes into a file and keeps the error, if there was one."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = self.error or error
            raise
