"""Small helpers of readers of files."""

import codecs
from collections.abc import Iterable
from pathlib import Path

from lit_rlft.core.checks import UsageError

__all__ = ["encoding", "existing", "listed", "reason", "stamps"]


def existing(path: Path) -> Path:
    """Return the path of a file.

    Raises:
        UsageError: There is no such file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return path


def listed(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder whose names have a pattern, sorted, but for hidden ones.

    macOS writes `._<name>` beside every file on a disk of another system's format.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def encoding(path: Path) -> str:
    """Return a text file's encoding: UTF-8, with or without a byte order mark, or UTF-16 by its.

    Programs of Windows write marks, and spreadsheets UTF-16.
    """
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def reason(error: Exception) -> str:
    """Return what an error says in one line, for a message of our own."""
    text = str(error).strip().partition("\n")[0]
    return f"no {text}" if isinstance(error, KeyError) else text


def stamps(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Return each file's time of change (ns) and size (bytes), which tell a changed file."""
    return [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
