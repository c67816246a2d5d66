"""Folders that are filled once, by one of several processes and users."""

import os
import stat
from pathlib import Path

import pytest

from lit_rlft.kit.cache import cached_folder


def fill(folder: Path) -> None:
    (folder / "numbers.npy").write_text("whole")


def test_others_may_read_what_the_mode_of_new_files_lets_them_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        made = cached_folder(tmp_path / "shared" / "data-1f", fill)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    assert stat.S_IMODE((made / "numbers.npy").stat().st_mode) == 0o640


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        fill(folder)
        (tmp_path / "copy").mkdir(exist_ok=True)
        folder.rename(tmp_path / "copy" / folder.name)  # nobody cleans up after SIGKILL
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cached_folder(tmp_path / "data-1f", killed)
    old, at_work = sorted((tmp_path / "copy").iterdir())
    old, at_work = old.rename(tmp_path / old.name), at_work.rename(tmp_path / at_work.name)
    os.utime(old / "numbers.npy", (0, 0))
    made = cached_folder(tmp_path / "data-1f", fill)
    assert {*tmp_path.iterdir()} == {made, at_work, tmp_path / "copy"}
