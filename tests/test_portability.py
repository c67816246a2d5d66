"""Windows and macOS, as far as another system can show: what they lack, and what they do else."""

import errno
import json
import locale
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import psutil
import pytest

from lit_rlft.cli.names import with_class_paths
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.side.rewards import RewardWorkers
from lit_rlft.loop.side.worker import Lost, SideProcess
from lit_rlft.runs import files, lines, lock
from lit_rlft.runs.files import PARTIAL, DiskError, write_folder, write_whole
from lit_rlft.runs.folder import check_name
from lit_rlft.runs.lock import LOCK, RunLock
from lit_rlft.runs.plain import told
from lit_rlft.runs.results import named
from tests.support import ROOT

ON_WINDOWS = """
import sys, types
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
import http.server, subprocess, tempfile  # which know this system
sys.platform = "win32"
sys.modules["msvcrt"] = types.ModuleType("msvcrt")
"""
"""Begins a program that sees nothing of Unix."""


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")


def python(code: str, **environment: str) -> str:
    command, settings = [sys.executable, "-c", code], {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120, env=settings)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode("ascii")


def test_the_front_door_opens_on_windows() -> None:
    code = (
        "from lit_rlft.cli import main\nfrom lit_rlft.cli.voting.server import VoteServer\n"
        "main(['--version'])\nmain(['list', 'rewards', '--domain', 'layout'])\n"
        "print(VoteServer.allow_reuse_address)"  # two servers could listen at one port
    )
    out = python(ON_WINDOWS + code)
    assert out.startswith("lit-rlft ") and "Alignment" in out and out.endswith("False\n")


def test_what_an_encoding_lacks_is_written_as_escapes() -> None:
    code = "from lit_rlft.cli import main\nmain(['--version'])\nprint('0.5 ± 0.1')"
    assert python(code, PYTHONIOENCODING="ascii").endswith("0.5 \\xb1 0.1\n")


def test_configs_are_read_as_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser opens files in the encoding of the system, and other words would be trained on."""
    config = tmp_path / "own.yaml"
    config.write_text('pipeline:\n  init_args:\n    negative_prompt: "grün"\n', encoding="utf-8")
    words = ["fit", "--config", str(config)]
    assert with_class_paths(words) == words
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "cp1252")
    assert with_class_paths(words)[-1] == config.read_text(encoding="utf-8")
    config.write_text("name: run\n", encoding="utf-8")
    assert with_class_paths(words) == words


def test_names_that_windows_cannot_give_are_refused(windows: None) -> None:
    check_name("first-2")
    with pytest.raises(UsageError, match=r"name must be .* got '12:30'"):
        check_name("12:30")


@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [
        (PureWindowsPath, r"C:\runs\a\checkpoints\last.ckpt", "checkpoints/last.ckpt"),
        (PureWindowsPath, r"D:\last.ckpt", "D:/last.ckpt"),
        (PurePosixPath, "/runs/a/checkpoints/last.ckpt", "/runs/a/checkpoints/last.ckpt"),
    ],
)
def test_a_checkpoint_may_lie_on_another_drive(kind: Any, path: str, name: str) -> None:
    assert named(kind(path), kind(r"C:\runs\a")) == name


class Held:
    """Refuses to rename some times, as Windows does while somebody has the file open."""

    def __init__(self, times: int) -> None:
        self.times, self.replace = times, os.replace

    def __call__(self, new: Path, path: Path) -> None:
        self.times -= 1
        if self.times >= 0:
            raise PermissionError(errno.EACCES, "in use")
        self.replace(new, path)


def test_a_file_that_somebody_reads_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: None
) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    path = write_whole(tmp_path / "metrics.json", "old")
    monkeypatch.setattr(os, "replace", Held(3))
    assert write_whole(path, "new").read_text(encoding="utf-8") == "new"
    monkeypatch.setattr(os, "replace", Held(10**6))
    with pytest.raises(DiskError, match=r"metrics.json, as another program has one of them open"):
        write_whole(path, "newer")
    assert path.read_text(encoding="utf-8") == "new" and not [*tmp_path.glob(f"*{PARTIAL}")]
    with pytest.raises(DiskError, match="close it there"):
        write_folder(tmp_path / "tuned", lambda new: [write(new / "a")])


def write(path: Path) -> Path:
    path.write_text("a", encoding="utf-8")
    return path


def test_windows_locks_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: None
) -> None:
    answers = [PermissionError(errno.EACCES, "held"), None, PermissionError(errno.EACCES, "held")]

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(handle: int, mode: int, num_bytes: int) -> None:
            if error := answers.pop(0):
                raise error

    monkeypatch.setattr(lines, "msvcrt", Msvcrt, raising=False)
    monkeypatch.setattr(lines, "_PAUSE", 0.0)
    with lines.locked(tmp_path / ".lock"):
        assert len(answers) == 1
    with pytest.raises(BlockingIOError), lines.locked(tmp_path / ".lock", wait=False):
        pass


def test_lines_end_alike_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_bytes(b'{"a": 1}\n{"torn": "' + b"x" * 5000)
    lines.append_lines(path, '{"b": "±"}\n')
    assert path.read_bytes() == '{"a": 1}\n{"b": "±"}\n'.encode()


def test_a_lock_needs_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_process_start", lock._process_start_elsewhere)
    monkeypatch.setattr(lock, "_boot", lambda: None)
    RunLock(tmp_path).acquire()
    with pytest.raises(UsageError, match="another fit writes to"):
        RunLock(tmp_path).acquire()
    held = json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))
    # After a restart another process can have the number.
    for change in ({"process_start": "1.5"}, {"pid": 2**22 + 1}):
        (tmp_path / LOCK).write_text(json.dumps(held | change), encoding="utf-8")
        RunLock(tmp_path).acquire()
    child = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert lock._process_start_elsewhere(child.pid) is None
    child.wait()
    assert lock._process_start_elsewhere(child.pid) is None


def test_the_end_of_a_worker_is_told_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no `waitid` before Python 3.13, and may not signal what has ended."""

    def killpg(group: int, number: int) -> None:
        assert (group, number) == (worker.pid, signal.SIGKILL)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.delattr(os, "waitid")
    monkeypatch.setattr(os, "killpg", killpg)
    worker = SideProcess.__new__(SideProcess)
    worker._connection, theirs = Pipe()
    worker._alive = -1
    worker._process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    theirs.close()
    with pytest.raises(Lost, match="ended with status 3"):
        worker._exchange(b"a call", 60)


def test_a_user_s_name_with_a_space_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    home = PureWindowsPath(r"C:\Users\Jane Doe")
    monkeypatch.setattr(Path, "home", lambda: home)
    assert told(rf"no file {home}\models\unet.safetensors") == r"no file models\unet.safetensors"


def test_workers_on_windows_are_threads(windows: None) -> None:
    with pytest.raises(UsageError, match="kind is 'process', which needs Unix; set it to thread"):
        RewardWorkers()
    RewardWorkers(kind="thread")
