"""Runs of the command line that benchmarks share: train, test, read metrics.json; resume."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Report = dict[str, Any]
Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")


def command_line(
    documentation: str, root: str, arms: Iterable[str] = (), seeds: Sequence[int] = (0, 1, 2)
) -> argparse.ArgumentParser:
    """Return a parser of what all such benchmarks take: root, seeds, workers, and arms if any.

    Args:
        documentation: Of the script, whose first line says what it measures.
        root: Default folder of the runs.
        arms: Names to choose from.
        seeds: Default seeds.
    """
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(root))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    if names := list(arms):
        parser.add_argument("--arms", nargs="+", choices=names, default=names)
    return parser


def run_all(jobs: Sequence[Job], run: Callable[[Job], Result], workers: int) -> dict[Job, Result]:
    """Run every job, `workers` at a time; return what each returned."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


def folder_of(root: Path, name: str) -> Path:
    """Return the folder of a run; characters that are no letters or digits become "_"."""
    return root / "".join(c if c.isalnum() else "_" for c in name)


def lit_rlft(stage: str, folder: Path, options: Sequence[str]) -> None:
    """Run one command on one thread, without progress bars, in a run's folder."""
    command = [str(Path(sys.executable).parent / "lit-rlft"), stage, *options]
    command += ["--root", str(folder.parent), "--name", folder.name]
    command += ["--trainer.enable_progress_bar", "false"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def fit(folder: Path, options: Sequence[str]) -> Path:
    """Train once and return the checkpoint; a finished run is kept, an interrupted one goes on.

    Args:
        folder: Of the run.
        options: Configs and settings for the command line.

    Raises:
        SystemExit: The folder holds a run with other options.
    """
    checkpoint, note = folder / "checkpoints" / "last.ckpt", folder / "benchmark.json"
    state = {"options": list(options), "finished": False}
    if note.exists():
        held = json.loads(note.read_text())
        if held["options"] != state["options"]:
            raise SystemExit(f"{folder} holds a run with other options; delete it or set --root")
        state = held
    if not state["finished"]:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(state))
        resume = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
        lit_rlft("fit", folder, [*options, *resume])
        note.write_text(json.dumps({**state, "finished": True}))
    return checkpoint


def fit_and_test(root: Path, name: str, options: Sequence[str]) -> Report:
    """Train and test on one thread and return metrics.json; what is finished is not repeated.

    Args:
        root: Folder of all runs.
        name: Of this run.
        options: Configs and settings for the command line; there is no validation unless they say
            so.

    Raises:
        SystemExit: The folder holds a run with other options.
    """
    folder, options = folder_of(root, name), ["--trainer.limit_val_batches", "0", *options]
    checkpoint, metrics = fit(folder, options), folder / "metrics.json"
    if not metrics.exists():
        lit_rlft("test", folder, [*options, "--ckpt_path", str(checkpoint)])
    return json.loads(metrics.read_text())


def compare_arms(
    documentation: str,
    root: str,
    arms: Iterable[str],
    metrics: Sequence[str],
    run: Callable[[Path, str, int, int, list[str]], Report],
    reward_calls: int,
) -> None:
    """Run arms at equal reward calls and print how each changed the metrics, and its cost.

    Args:
        documentation: Of the script.
        root: Default folder of the runs.
        arms: Their names.
        metrics: Names in metrics.json.
        run: Takes root, arm, seed, reward calls and further options; returns metrics.json.
        reward_calls: Default number of them.
    """
    parser = command_line(documentation, root, arms)
    parser.add_argument("--reward-calls", type=int, default=reward_calls)
    options, extra = parser.parse_known_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    calls, costs = options.reward_calls, ("reward_calls", "seconds")
    results = run_all(jobs, lambda job: run(options.root, *job, calls, extra), options.workers)
    rows = []
    for arm in options.arms:
        reports = [results[arm, seed] for seed in options.seeds]
        cost = [f"{statistics.mean(r['cost'][name] for r in reports):.0f}" for name in costs]
        rows.append([arm, *(change(reports, metric) for metric in metrics), *cost])
    print_table(["arm", *metrics, *(name.replace("_", " ") for name in costs)], rows)


def change(results: Sequence[Report], metric: str) -> str:
    """Return `reference -> tuned (gain +- standard error over runs)` of one metric.

    The gain is the difference of the two means, also of a metric that not all samples have: the
    paired differences of a report leave out samples that lack it in either model.
    """
    means = {arm: [r[arm][metric]["mean"] for r in results] for arm in ("reference", "tuned")}
    gains = [tuned - reference for reference, tuned in zip(*means.values(), strict=True)]
    reference, tuned = map(statistics.mean, means.values())
    gain = f"{statistics.mean(gains):+.3f} ± {standard_error(gains):.3f}"
    return f"{reference:.3f} → {tuned:.3f} ({gain})"


def standard_error(values: Sequence[float], single: float = float("nan")) -> float:
    """Return the standard error of the mean over runs, `single` for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else single
