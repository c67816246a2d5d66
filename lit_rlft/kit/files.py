"""Small helpers of readers of files."""

from collections.abc import Iterable
from pathlib import Path

from lit_rlft.core.checks import UsageError

__all__ = ["existing", "reason", "stamps"]


def existing(path: Path) -> Path:
    """Return the path of a file.

    Raises:
        UsageError: There is no such file.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return path


def reason(error: Exception) -> str:
    """Return what an error says in one line, for a message of our own."""
    text = str(error).strip().partition("\n")[0]
    return f"no {text}" if isinstance(error, KeyError) else text


def stamps(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Return each file's time of change (ns) and size (bytes), which tell a changed file."""
    return [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
