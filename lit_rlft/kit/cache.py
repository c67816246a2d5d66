"""Arrays that are made once and kept on disk; later runs map them into memory."""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import NothingLeft, Report

__all__ = ["cached_folder", "listing", "open_arrays", "save_arrays", "save_report", "user_cache"]

_REPORT, _LISTING = "report.txt", "left_out.txt"
_LEFT_AFTER = 3600.0
"""Seconds after which a folder that nobody has written to is one that a killed process left."""


def user_cache(name: str, given: str | None = None) -> Path:
    """Return the given cache folder, or `lit-rlft/<name>` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "lit-rlft" / name


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder; where it is missing it is filled first, and appears whole or not at all.

    Args:
        folder: Its name depends on all that its files depend on.
        fill: Writes the files into the folder that it is given.

    Raises:
        UsageError: The files cannot be written.
    """
    if folder.is_dir():
        return folder
    partial: Path | None = None
    try:
        # Not by `tempfile`, whose folders nobody else may read: caches can be shared.
        partial = folder.with_name(f".partial-{folder.name}-{uuid.uuid4().hex}")
        partial.mkdir(parents=True)
        _clean(folder, partial.stat().st_mtime)
        fill(partial)
        partial.rename(folder)
    except NothingLeft as error:
        beside = folder.with_name(f"{folder.name}.{_LISTING}")
        beside.write_text(error.listing, encoding="utf-8")
        raise NothingLeft(f"{error}{_pointer(error.listing, beside)}") from error
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


def _clean(folder: Path, now: float) -> None:
    """Remove what killed processes left of a folder; `now` is by the clock of its disk."""
    for partial in folder.parent.glob(f".partial-{glob.escape(folder.name)}-*"):
        with contextlib.suppress(OSError):  # another process may finish it, or remove it as well
            ages = [now - file.stat().st_mtime for file in partial.iterdir()]
            if ages and min(ages) > _LEFT_AFTER:
                shutil.rmtree(partial, ignore_errors=True)


def save_arrays(
    folder: Path, final: Path, arrays: Mapping[str, NDArray[Any]], report: Report
) -> None:
    """Write arrays and the report on entries that were left out.

    Args:
        folder: Where to write.
        final: What the folder will be called, for the report.
        arrays: By name.
        report: On the entries that they were made of.
    """
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    save_report(folder, final, report)


def save_report(folder: Path, final: Path, report: Report) -> None:
    """Write the report in one line, and beside it the list of what was left out.

    Args:
        folder: Where to write.
        final: What the folder will be called, for the report.
        report: On the entries of a file.
    """
    listing = report.listing()
    (folder / _LISTING).write_text(listing, encoding="utf-8")
    told = f"{report}{_pointer(listing, final / _LISTING)}"
    (folder / _REPORT).write_text(told, encoding="utf-8")


def _pointer(listing: str, path: Path) -> str:
    """Return where several entries are listed; nothing for one, which the report has told of."""
    return f"; every one is listed in {path}" if listing.count("\n") > 1 else ""


def listing(folder: Path) -> str:
    """Return every entry that was left out of a cached folder, or of one in which none was left."""
    for file in (folder / _LISTING, folder.with_name(f"{folder.name}.{_LISTING}")):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


def open_arrays(folder: Path, names: Sequence[str]) -> list[NDArray[Any]]:
    """Say what was left out, and return the arrays that `save_arrays` wrote, memory-mapped."""
    rank_zero_info((folder / _REPORT).read_text(encoding="utf-8"))
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
