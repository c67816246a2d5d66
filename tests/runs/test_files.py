"""Files that are whole, and what is said when a disk takes no more."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.checkpoint_file import WholeCheckpoints
from lit_rlft.runs.files import (
    PARTIAL,
    DiskError,
    clean,
    disk_trouble,
    whole,
    write_folder,
    write_whole,
    writing,
)

OLD, NEW = {"a": torch.zeros(1000)}, {"a": torch.ones(1000), "b": torch.ones(100_000)}


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond some bytes, as a disk that is full does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 4096, 300_000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoints/last.ckpt"
    WholeCheckpoints().save_checkpoint(OLD, str(path))
    with small_files(size), pytest.raises(DiskError) as raised:
        WholeCheckpoints().save_checkpoint(NEW, str(path))
    text = str(raised.value)
    assert f"{path}: the file would be larger than allowed" in text and "B free)" in text
    assert text.endswith(f"--ckpt_path {path}") and len(text) < 300 + len(str(path)) * 2
    assert torch.equal(torch.load(path, weights_only=True)["a"], OLD["a"])
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    WholeCheckpoints().save_checkpoint(NEW, str(path))
    assert torch.load(path, weights_only=True)["b"].sum() == 100_000


def fill(path: Path, kind: str) -> None:
    """Write 400 kB with a library's own writer."""
    if kind == "numpy":
        np.save(path, np.zeros(50_000))
    elif kind == "torch":
        torch.save(torch.zeros(100_000), path)
    elif kind == "safetensors":
        save_file({"a": torch.zeros(100_000)}, path)
    elif kind == "pillow":
        Image.effect_noise((700, 700), 50).save(path, format="PNG")
    else:
        path.write_bytes(bytes(400_000))


@pytest.mark.parametrize("kind", ["numpy", "torch", "safetensors", "pillow", "python"])
def test_every_library_that_meets_a_full_disk_gives_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.bin"
    ends = pytest.raises(UsageError, match=r"B free\); .*, then go on$")
    with small_files(2000), ends, writing(path, "then go on"):
        fill(path, kind)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full ("),
        (errno.EDQUOT, "the disk quota is used up ("),
        (errno.EIO, "the disk reports an input/output error ("),
        (errno.EROFS, "the file system is read-only ("),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_disk_that_fails_after_some_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, at: int
) -> None:
    path, calls = tmp_path / "last.ckpt", 0
    WholeCheckpoints().save_checkpoint(OLD, str(path))

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(number, os.strerror(number))
            return self.file.write(content)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest: Failing(opened(self, *rest)))
    with pytest.raises(DiskError) as raised:
        WholeCheckpoints().save_checkpoint(NEW, str(path))
    monkeypatch.undo()
    assert words in str(raised.value)
    assert torch.equal(torch.load(path, weights_only=True)["a"], OLD["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_device_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / f"a.txt{PARTIAL}").symlink_to("/dev/full")
    full = pytest.raises(DiskError, match=r"a\.txt: the disk is full \(.* free\); make room there")
    with full, writing(tmp_path / "a.txt"):
        write_whole(tmp_path / "a.txt", "text")


def test_other_errors_are_no_disks() -> None:
    for error in (ValueError("No"), FileNotFoundError(errno.ENOENT, "no"), PermissionError(13, "")):
        assert disk_trouble(error, "path", "") is None
        with pytest.raises(type(error)), writing("path"):
            raise error


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), whole(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_place_of_a_file_is_named_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "comparison.png"
    (folder / "own").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"comparison\.png is a folder.*move it away"):
        write_whole(folder, "text")
    assert (folder / "own").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_swapped_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"

    def write(names: list[str], fail: bool = False) -> Any:
        def into(target: Path) -> list[Path]:
            for name in names:
                (target / name).write_text(name)
            if fail:
                raise OSError(errno.ENOSPC, "full")
            return [target, *(target / name for name in names)]

        return into

    assert write_folder(folder, write(["a", "b"])) == [folder, folder / "a", folder / "b"]
    with pytest.raises(OSError):
        write_folder(folder, write(["c"], fail=True))
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
    old = tmp_path / "tuned.old"
    old.mkdir()
    (old / "a").write_text("")  # killed after the swap
    write_folder(folder, write(["c"]))
    assert [p.name for p in folder.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]


def test_what_a_killed_run_left_is_cleaned(tmp_path: Path) -> None:
    for name in ("checkpoints/last.ckpt", "panels/1.png", "config.yaml", "tuned/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    for name in ("checkpoints/last.ckpt.partial", "panels/1.png.partial", "config.yaml.partial"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints/last.ckpt").write_text("whole")
    (tmp_path / "tuned/x").write_text("")
    (tmp_path / "tuned").rename(tmp_path / "tuned.old")  # killed within the swap
    (tmp_path / "tuned.partial").mkdir()
    clean(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["checkpoints/last.ckpt", "tuned/x"]
    assert not list(tmp_path.glob("*.partial"))
