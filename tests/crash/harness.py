"""Kills runs with SIGKILL, resumes them, and compares their ends with that of a whole run.

A run is a forked child of a process that has imported everything: a kill costs a second. Two
processes are two children under torchrun's variables. A child is killed by its parent at a random
time, or kills all of itself at an event it is told to wait for: a phase of the work, or a step of
writing a checkpoint.
"""

import mmap
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlft.cli import main
from lit_rlft.loop.hooks import Hooks
from lit_rlft.runs import files
from tests.support import TWO_PROCESSES, arguments

ALGORITHMS = ("p_graft", "ddpo", "noise_ppo")
PHASES = ("start", "sampling", "update", "between", "validation", "saving", "saved", "end")
SAVING = ("begin", "chunk", "sync", "replace")
"""Steps of writing a checkpoint at which a run may be killed."""
LAST = Path("checkpoints/last.ckpt")
TINY = {
    # Three passes of two rounds; validations in their middle and at their ends.
    "data.init_args.num_train": 16,
    "data.init_args.num_val": 4,
    "data.init_args.batch_size": 8,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.num_candidates": 4,
    "model.init_args.num_epochs": 2,
    "model.init_args.minibatch_size": 8,
    "model.init_args.num_eval_samples": 2,
    "trainer.max_epochs": 3,
    "trainer.val_check_interval": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "checkpoint.max_share": 1.0,
    "trainer.callbacks+": "tests.crash.harness.Phases",
}
OWN = {
    "p_graft": {},
    "ddpo": {
        "model.init_args.microbatch_size": 7,
        "model.init_args.advantage.init_args.min_count": 2,
    },
    "noise_ppo": {"model.init_args.advantage": "lit_rlft.core.advantage.RunningAdvantage"},
}
EVERY_ROUND = 1e-9
"""Minutes."""

_shared: mmap.mmap | None = None
_at_event: Callable[[str], None] = lambda name: None  # noqa: E731


@dataclass(frozen=True)
class Case:
    """What is run: an algorithm's config, on one or two processes."""

    algorithm: str
    processes: int = 1

    def words(self, name: str, minutes: float | None, ckpt_path: Path | None = None) -> list[str]:
        """Return the command of a fit that saves every so many minutes, or after epochs alone."""
        configs = ("gaussian_mixture", self.algorithm)
        further: dict[str, Any] = {"name": name, "checkpoint.every_minutes": minutes}
        if self.processes > 1:
            further |= {**TWO_PROCESSES, "model.init_args.minibatch_size": 4}
        if ckpt_path is not None:
            further["ckpt_path"] = str(ckpt_path)
        return arguments("fit", configs, TINY, OWN[self.algorithm], further)


@dataclass(frozen=True)
class Kill:
    """When a run is killed: after some seconds, or at the n-th event of a name, and how.

    Events are phases and steps of saving. Number 0 raises an error in place of a signal.
    """

    seconds: float | None = None
    event: str = ""
    count: int = 1
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, the phase, the seconds it took, and what it printed."""

    status: int
    phase: str
    seconds: float
    output: str


class Phases(Hooks):
    """Tells the parent what the run does."""

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        _enter({"collect": "sampling", "update": "update"}.get(name, "validation"))

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        _enter("between")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _enter("end")


def run(
    words: Sequence[str],
    processes: int = 1,
    kill: Kill | None = None,
    before: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a command in forked children, in this process's working directory.

    Args:
        words: Of the command.
        processes: How many.
        kill: When to kill them all.
        before: Called in each child first.
    """
    global _shared
    _shared = mmap.mmap(-1, 1)
    began, logs = time.monotonic(), Path("log.txt")
    port = free_port()
    logs.write_text("")
    places = [_torchrun(r, processes, port) if processes > 1 else {} for r in range(processes)]
    children = [fork(partial(_child, words, place, kill, before), logs) for place in places]
    end = None if kill is None or kill.seconds is None else began + kill.seconds
    status = wait(children, end)
    phase = PHASES[_shared[0]]
    return Outcome(status, phase, time.monotonic() - began, logs.read_text())


def resumed(case: Case, name: str, minutes: float | None) -> Outcome:
    """Run a killed run to its end, as its user would: from last.ckpt, or from the start."""
    last = Path("runs") / name / LAST
    return run(case.words(name, minutes, last if last.is_file() else None), case.processes)


def difference(first: Path, second: Path) -> str:
    """Return what differs between the ends of two runs, "" where nothing does.

    Compared bit by bit: weights, optimiser, schedules, counters, running statistics, the exported
    model, and every value of every scalar in TensorBoard but times.
    """
    ends = [torch.load(folder / LAST, weights_only=True) for folder in (first, second)]
    for end in ends:
        del end["lit_rlft"]["cost"]["seconds"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "lit_rlft", "global_step"):
        if not _equal(ends[0][key], ends[1][key]):
            return key
    exports = [{p.name: p.read_bytes() for p in (f / "tuned").iterdir()} for f in (first, second)]
    if exports[0] != exports[1]:
        return "tuned"
    logs = [_scalars(folder) for folder in (first, second)]
    if logs[0] != logs[1]:
        keys = [k for k in {**logs[0], **logs[1]} if logs[0].get(k) != logs[1].get(k)]
        return f"scalars {sorted(keys)[:5]}"
    panels = [{p.name: p.read_bytes() for p in (f / "panels").iterdir()} for f in (first, second)]
    if panels[0] != panels[1]:
        return "panels"
    left = [p.name for p in second.rglob("*") if files.PARTIAL in p.name or "lock" in p.name]
    return f"left behind: {left}" if left else ""


def random_kill(choose: random.Random, length: float) -> tuple[Kill, float | None]:
    """Return a random kill, and how often the run saves, in minutes.

    Args:
        choose: Draws it.
        length: Seconds of a whole run.
    """
    minutes = choose.choice([EVERY_ROUND, EVERY_ROUND, None])
    if choose.random() < 0.5:
        return Kill(seconds=choose.uniform(0.3, 1) * length), minutes
    return Kill(event=choose.choice(SAVING), count=choose.randint(1, 8)), minutes


@contextmanager
def fresh(folder: Path) -> Iterator[None]:
    """Work in an empty folder, which is removed afterwards."""
    before = Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def fork(work: Callable[[], None], log: Path) -> int:
    """Start a child that does some work, prints into a file and exits; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _child(
    words: Sequence[str], place: dict[str, str], kill: Kill | None, before: Callable[[], None]
) -> None:
    os.environ |= place
    _watch_saving(kill if place.get("RANK", "0") == "0" else None)
    before()
    main(words)


def _torchrun(rank: int, processes: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "crash",
    }
    return {name: str(value) for name, value in values.items()}


def _watch_saving(kill: Kill | None) -> None:
    """Report the steps of writing checkpoints, and die at the one that was asked for."""
    global _at_event
    seen = {name: 0 for name in (*SAVING, *PHASES)}

    def at_event(name: str) -> None:
        seen[name] += 1
        if kill is not None and kill.event == name and seen[name] == kill.count:
            if not kill.number:
                raise RuntimeError("a fault of its own")
            os.kill(os.getpid(), kill.number)

    _at_event = at_event
    whole, sync, replace, write = files.whole, os.fsync, os.replace, files._Recorded.write

    @contextmanager
    def watched(path: Path) -> Iterator[Any]:
        saving = path.suffix == ".ckpt"
        if saving:
            _enter("saving")
            at_event("begin")
        with whole(path) as file:
            yield file
        if saving:
            _enter("saved")

    def now(name: str) -> None:
        if _shared is not None and PHASES[_shared[0]] == "saving":
            at_event(name)

    def half(self: Any, content: Any) -> int:
        middle = len(content) // 2  # a chunk is torn, too
        written = write(self, content[:middle])
        self.file.flush()
        now("chunk")
        return written + write(self, content[middle:])

    def synced(handle: Any) -> None:
        now("sync")
        sync(handle)

    def replaced(source: Any, target: Any) -> None:
        now("replace")
        replace(source, target)

    import lit_rlft.runs.checkpoint_file as checkpoint_file

    checkpoint_file.whole = watched
    files._Recorded.write = half
    os.fsync, os.replace = synced, replaced


def _enter(phase: str) -> None:
    if _shared is not None:
        _shared[0] = PHASES.index(phase)
        _at_event(phase)


def wait(children: list[int], end: float | None = None) -> int:
    """Wait for all children, kill them at the time `end` or when one fails; return the worst."""
    left, worst = set(children), 0
    while left:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                left.discard(child)
                code = os.waitstatus_to_exitcode(status)
                worst = worst or code
                if code < 0:
                    end = time.monotonic()  # a killed machine takes all its processes along
        if end is not None and time.monotonic() >= end:
            for child in left:
                os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.005)
    return worst


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Return all scalars; rounds that were repeated after a kill must have the same."""
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(path), {"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("time/") or "second" in tag:
                continue
            for event in events.Scalars(tag):
                value = found.setdefault((tag, event.step), event.value)
                if value != event.value:
                    found[(tag, -event.step)] = event.value
    return found


__all__ = [
    "ALGORITHMS",
    "EVERY_ROUND",
    "Case",
    "Kill",
    "Outcome",
    "Phases",
    "difference",
    "fork",
    "free_port",
    "fresh",
    "random_kill",
    "resumed",
    "run",
    "wait",
]
