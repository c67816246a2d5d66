"""A killed run, resumed, ends as if it had never stopped."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import lit_rlft.cli.app  # noqa: F401  (children find it imported)
from lit_rlft.cli import main
from lit_rlft.runs.lock import LOCK, RunLock
from tests.crash.harness import EVERY_ROUND, LAST, Case, Kill, Outcome, difference, resumed, run
from tests.support import ROOT, SCRIPT, working_directory

NAME = "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Return a function that returns the folder of a case's uninterrupted run."""

    @cache
    def ran(case: Case) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        with working_directory(folder):
            outcome = run(case.words(NAME, EVERY_ROUND), case.processes)
        assert outcome.status == 0, outcome.output
        return folder / "runs" / NAME

    return ran


def assert_same_end(case: Case, whole: Path, minutes: float | None = EVERY_ROUND) -> None:
    """Resume the run and compare."""
    outcome = resumed(case, NAME, minutes)
    assert outcome.status == 0, outcome.output
    assert difference(whole, Path("runs", NAME)) == ""


def killed(case: Case, kill: Kill, minutes: float | None = EVERY_ROUND) -> Outcome:
    outcome = run(case.words(NAME, minutes), case.processes, kill)
    expected = 1 if not kill.number else 128 + kill.number
    expected = -9 if kill.number == signal.SIGKILL else expected
    assert outcome.status == expected, outcome.output
    return outcome


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "kill"),
    [
        (Case("p_graft"), Kill(event="chunk", count=40)),
        (Case("ddpo"), Kill(event="sampling", count=4)),
        pytest.param(Case("noise_ppo"), Kill(event="update", count=5), marks=slow),
        pytest.param(Case("p_graft"), Kill(event="sampling", count=1), marks=slow),
        pytest.param(Case("p_graft"), Kill(event="validation", count=7), marks=slow),
        pytest.param(Case("ddpo"), Kill(event="sync", count=2), marks=slow),
        pytest.param(Case("ddpo"), Kill(event="replace", count=3), marks=slow),
        pytest.param(Case("p_graft", 2), Kill(event="replace", count=2), marks=slow),
        pytest.param(Case("ddpo", 2), Kill(event="update", count=3), marks=slow),
        pytest.param(Case("noise_ppo", 2), Kill(event="sampling", count=4), marks=slow),
    ],
)
def test_a_killed_run_resumes_bit_by_bit(
    whole: Callable[[Case], Path], case: Case, kill: Kill
) -> None:
    killed(case, kill)
    if (last := Path("runs", NAME, LAST)).exists():
        torch.load(last, weights_only=True)
    assert Path("runs", NAME, LOCK).is_file()
    assert_same_end(case, whole(case))


@pytest.mark.parametrize(
    ("case", "number"),
    [
        (Case("p_graft"), signal.SIGTERM),
        pytest.param(Case("ddpo"), signal.SIGINT, marks=slow),
        pytest.param(Case("ddpo", 2), signal.SIGTERM, marks=slow),
        pytest.param(Case("p_graft", 2), signal.SIGINT, marks=slow),
    ],
)
@pytest.mark.parametrize("event", ["update", pytest.param("validation", marks=slow)])
def test_a_signal_ends_a_fit_after_its_round(
    whole: Callable[[Case], Path], case: Case, number: signal.Signals, event: str
) -> None:
    outcome = killed(case, Kill(event=event, count=2, number=number), minutes=None)
    how = f"run the same command with --name {NAME} --ckpt_path runs/{NAME}/{LAST}"
    assert f"stopped by {number.name}; to go on, {how}" in outcome.output
    assert "Traceback" not in outcome.output and not Path("runs", NAME, LOCK).exists()
    assert_same_end(case, whole(case))


@pytest.mark.parametrize(
    ("event", "count"), [("sampling", 4), pytest.param("sampling", 5, marks=slow)]
)
def test_an_error_of_ones_own_loses_no_round(
    whole: Callable[[Case], Path], event: str, count: int
) -> None:
    # In the middle of a pass, and in its first round; saved after passes alone.
    case = Case("p_graft")
    killed(case, Kill(event=event, count=count, number=0), minutes=None)
    saved = torch.load(Path("runs", NAME, LAST), weights_only=True)
    assert saved["lit_rlft"]["num_rounds"] == count - 1
    assert_same_end(case, whole(case))


def test_an_event_file_that_cannot_grow_ends_the_run_with_one_sentence() -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    case = Case("p_graft")
    outcome = run(case.words(NAME, EVERY_ROUND), before=small_files)
    assert outcome.status == 1 and "Traceback" not in outcome.output, outcome.output
    assert outcome.output.count("lit-rlft: error:") == 1
    assert "the file would be larger than allowed" in outcome.output
    assert not Path("runs", NAME, LOCK).exists()


LIMIT = 12_000


def test_a_second_fit_of_a_name_is_refused_and_changes_nothing() -> None:
    folder = Path("runs", NAME)
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    with pytest.raises(SystemExit, match=r"error: another fit writes to runs/run \(process \d+"):
        main(Case("p_graft").words(NAME, None))
    lock.release()
    assert not list(folder.iterdir())


def test_a_run_that_crashed_before_its_first_checkpoint_is_started_again() -> None:
    (Path("runs", NAME) / "checkpoints").mkdir(parents=True)
    words = [*Case("p_graft").words(NAME, None), "--trainer.max_epochs=1"]
    main(words)
    with pytest.raises(SystemExit, match=f"--ckpt_path runs/{NAME}/{LAST}$"):
        main(words)


@slow
def test_a_signal_to_the_first_of_lightnings_processes_ends_both() -> None:
    case = Case("p_graft", 2)
    words = [*case.words(NAME, EVERY_ROUND), "--trainer.max_epochs=100000"]
    path = os.pathsep.join((str(Path.cwd()), str(ROOT)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with Path("log.txt").open("w") as log:
        process = subprocess.Popen([str(SCRIPT), *words], env=environment, stdout=log, stderr=log)
    last, end = Path("runs", NAME, LAST), time.monotonic() + 200
    while not last.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(60)
    finally:
        process.kill()
    printed = Path("log.txt").read_text()
    assert status == 143, printed
    assert printed.count("stopped by SIGTERM; to go on") == 1 and "Traceback" not in printed
    torch.load(last, weights_only=True)
