"""The lock of a run's folder: held, refused, given back, taken over."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.runs.lock import LOCK, RunLock
from tests.support import TINY_MIXTURE, arguments, working_directory


def changed(folder: Path, **fields: Any) -> None:
    """Change fields of a lock that is held."""
    path = folder / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_second_fit_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    text = (tmp_path / LOCK).read_text()
    with pytest.raises(UsageError, match=rf"another fit writes to .*process {os.getpid()} on .*"):
        second.acquire()
    second.release()
    assert (tmp_path / LOCK).read_text() == text
    first.release()
    second.acquire()
    second.release()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        RunLock(tmp_path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # a zombie still has its number
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == child
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    os.waitpid(child, 0)


@pytest.mark.parametrize("field", ["process_start", "boot"])
def test_a_number_that_another_process_has_now_is_noticed(tmp_path: Path, field: str) -> None:
    RunLock(tmp_path).acquire()
    changed(tmp_path, **{field: "1"})
    RunLock(tmp_path).acquire()


def test_a_lock_of_another_machine_is_refused_with_the_remedy(tmp_path: Path) -> None:
    RunLock(tmp_path).acquire()
    changed(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(UsageError, match=rf"1 on elsewhere.*delete .*{LOCK} if that process has"):
        RunLock(tmp_path).acquire()


def test_a_job_that_is_started_anew_takes_its_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    RunLock(tmp_path).acquire()
    changed(tmp_path, host="elsewhere")
    with pytest.raises(UsageError):  # another step of the job, on another of its machines
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    changed(tmp_path, host="elsewhere")
    with pytest.raises(UsageError):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 3}'])
def test_a_damaged_lock_does_not_stop_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (0, 0))
    if content.startswith('{"pid'):
        with pytest.raises(UsageError):  # of a machine that nobody knows
            RunLock(tmp_path).acquire()
        return
    RunLock(tmp_path).acquire()


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        RunLock(tmp_path).acquire()
        changed(tmp_path, process_start="1")
        results: list[bool] = []
        barrier = threading.Barrier(8)

        def take(results: list[bool] = results, barrier: threading.Barrier = barrier) -> None:
            lock = RunLock(tmp_path)
            barrier.wait()
            try:
                lock.acquire()
                results.append(True)
            except UsageError:
                results.append(False)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(results) == 1, results
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
        (tmp_path / LOCK).unlink()


def test_without_hard_links_the_file_is_created_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refused)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UsageError):
        RunLock(tmp_path).acquire()
    first.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_checkpoints_that_two_runs_share_is_locked(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    held = RunLock(shared, "checkpoint.dirpath")
    shared.mkdir()
    held.acquire()
    with (
        working_directory(tmp_path),
        pytest.raises(SystemExit, match=r"writes to .*shared .*choose another checkpoint\.dirpath"),
    ):
        main(
            arguments(
                "fit",
                ("gaussian_mixture", "graft"),
                TINY_MIXTURE | {"checkpoint.dirpath": str(shared)},
            )
        )
    assert not list(shared.glob("*.ckpt"))
    held.release()
