"""Arrays made once and kept on disk, memory-mapped from then on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from lit_rlft.core.checks import UsageError

__all__ = ["cached_folder", "user_cache"]


def user_cache(name: str, given: str | None = None) -> Path:
    """Return the folder of cached things: the given one, or `lit-rlft/<name>` in the user's."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "lit-rlft" / name


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder, which appears whole or not at all where it is missing.

    Args:
        folder: Its name tells all that its files depend on.
        fill: Writes the files into the folder that it is given.

    Raises:
        UsageError: The files cannot be written.
    """
    if folder.is_dir():
        return folder
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(dir=folder.parent, prefix=".partial-"))
        fill(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise UsageError(
                f"{folder.parent}: what was read could not be kept there ({error.strerror}); set "
                "cache_dir to a folder with room"
            ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
