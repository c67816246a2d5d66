"""A run's folder, read for a report or a comparison."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lit_rlft.core.checks import UsageError, from_json, loading
from lit_rlft.report.curves import Curves, read_curves
from lit_rlft.runs.plain import Plain, flat, told
from lit_rlft.runs.results import SAMPLES
from lit_rlft.runs.shown import SHOWN, TEST, read_shown
from lit_rlft.runs.warned import WARNINGS

__all__ = ["Run", "check_domain", "distinct_names", "read_run", "settings_that_differ"]

METRICS, CONFIG = "metrics.json", "config.yaml"

_OF_A_VALIDATION = {"reward", "updates", "reward_calls", "guards", "summary"}
_NO_SETTINGS = ("name", "root", "ckpt_path", "trainer.logger", "trainer.callbacks")
"""Keys that say where a run is rather than what it does."""


@dataclass
class Run:
    """What a run left in its folder.

    Attributes:
        folder: The run's own.
        name: How it is told from others.
        config: Its config as it stands in the file.
        metrics: Content of metrics.json, empty where there was no test.
        notes: What is missing or damaged, a sentence each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Plain]:
        """Its settings by key, without paths of the machine and secrets."""
        own = flat({key: x for key, x in self.config.items() if key not in _NO_SETTINGS})
        return {key: value for key, value in own.items() if key not in _NO_SETTINGS}

    @cached_property
    def curves(self) -> Curves:
        """What it logged while it trained."""
        found = read_curves(self.folder)
        self.notes += found.notes
        if not found.points:
            self.notes.append(
                "no curves: the folder has neither TensorBoard's event files nor metrics.csv of a "
                "fit; trainer.logger writes them"
            )
        return found

    @cached_property
    def checkpoints(self) -> list[dict[str, Any]]:
        """Records of its validations, in order."""
        names = sorted((self.folder / SHOWN).glob("*.json.gz"))
        found = [self._record(path) for path in names if re.match(r"\d+\.json", path.name)]
        records = [record for record in found if record]
        for record in [one for one in records if not one.keys() >= _OF_A_VALIDATION]:
            records.remove(record)
            self.notes.append("a record of a validation lacks its numbers and is left out")
        if not found:
            self.notes.append(
                "no samples of validations: the run kept none (report/*.json.gz); fits of this "
                "version keep them at every validation"
            )
        return sorted(records, key=lambda record: record["updates"])

    @cached_property
    def extremes(self) -> list[dict[str, Any]]:
        """The best, worst and most changed samples of its test."""
        path = self.folder / SHOWN / TEST
        record = self._record(path) if path.is_file() else None
        return record["entries"] if record else []

    @cached_property
    def warnings(self) -> list[tuple[str, str]]:
        """Command and text of what it warned of, each once."""
        found: dict[tuple[str, str], None] = {}
        path = self.folder / WARNINGS
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.splitlines():
            try:
                one = from_json(line)
                found[str(one["stage"]), told(str(one["message"]))] = None
            except (ValueError, KeyError, TypeError):
                continue  # a line that a killed run has left unfinished
        return list(found)

    @property
    def reward(self) -> str:
        """The name of the reward it was trained for, "" where nothing tells."""
        first = self.metrics.get("reward") or next(iter(self.metrics.get("tuned", {})), "")
        return first or next((record["reward"] for record in self.checkpoints), "")

    def table(self) -> tuple[list[tuple[int, int, str]], dict[str, list[float]]]:
        """Return row, sample and label of each sample of the test, and its measurements by name.

        Raises:
            UsageError: There is no such file, or it is damaged.
        """
        path = self.folder / SAMPLES
        if not path.is_file():
            raise UsageError(f"{self.folder} has no {SAMPLES}; {_test(self.folder)}")
        with (
            loading(f"{path} is damaged; {_test(self.folder)}"),
            path.open(newline="", encoding="utf-8") as file,
        ):
            header, *lines = list(csv.reader(file))
            keys = [(int(line[0]), int(line[1]), line[2]) for line in lines]
            columns = {
                name: [float(line[i]) if line[i] else math.nan for line in lines]
                for i, name in enumerate(header)
                if i > 2
            }
            return keys, columns

    def _record(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_shown(path)
        except UsageError:
            self.notes.append(f"{path.name} is damaged: its samples are left out")
            return None


def read_run(folder: Path, *, tested: bool = False) -> Run:
    """Read a run's folder.

    Args:
        folder: The run's.
        tested: Whether it must have the results of a test.

    Raises:
        UsageError: It is no folder of a run, a file of it is damaged, or there was no test.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give the folder of a run, such as runs/demo")
    config_file = next(
        (path for path in (folder / CONFIG, folder / "config_test.yaml") if path.is_file()), None
    )
    if config_file is None:
        raise UsageError(f"{folder} has no {CONFIG}: it is not the folder of a run")
    with loading(f"{config_file} is damaged"):
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("it holds no settings")
    run, path = Run(folder, folder.resolve().name, config), folder / METRICS
    if path.is_file():
        with loading(f"{path} is damaged; {_test(folder)}"):
            run.metrics = from_json(path.read_text(encoding="utf-8"))
            _check_results(run.metrics)
    elif tested:
        raise UsageError(f"{folder} has no {METRICS}; {_test(folder)}")
    else:
        run.notes.append(f"no test yet; {_test(folder)}")
    return run


def _check_results(metrics: Mapping[str, Any]) -> None:
    """Raise an error where results are none that a test writes: no numbers where those belong."""
    cost, checkpoint = metrics.get("cost", {}), metrics.get("checkpoint")
    arms = [
        metrics["tuned"],
        metrics["reference"],
        metrics.get("gain", {}),
        metrics.get("kept", {}),
    ]
    pages = [page for stage in cost.get("phases", {}).values() for page in stage.values()]
    measured = [moments or {} for arm in arms for moments in arm.values()]
    counts = [cost.get(name) for name in ("reward_calls", "denoiser_calls", "seconds")]
    counts += [metrics.get("num_samples"), *(float(page["seconds"]) for page in pages)]
    if isinstance(checkpoint, Mapping):
        counts += [checkpoint.get(name) for name in ("num_rounds", "num_updates")]
    numbers = [*counts, *(value for own in (*measured, *pages) for value in own.values())]
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise TypeError("it has something else where numbers belong")
    if not isinstance(metrics.get("reward") or "", str):
        raise TypeError("its reward has no name")
    list(metrics.get("exploitation") or [])


def distinct_names(runs: Sequence[Run]) -> None:
    """Name runs by as many of their folders as it takes to tell them apart."""
    for depth in range(1, 8):
        names = ["/".join(run.folder.resolve().parts[-depth:]) for run in runs]
        if len({*names}) == len(names):
            break
    else:
        raise UsageError("a run is given twice; give each folder once")
    for run, name in zip(runs, names, strict=True):
        run.name = name


def check_domain(runs: Sequence[Run]) -> None:
    """Raise UsageError where runs are of different domains."""
    domains = [_domain(run) for run in runs]
    for run, domain in zip(runs, domains, strict=True):
        if domain != domains[0]:
            raise UsageError(
                f"{runs[0].folder} is of {domains[0]} and {run.folder} of {domain}: their samples "
                "have nothing to be compared by; give runs of one domain"
            )


def settings_that_differ(runs: Sequence[Run]) -> dict[str, list[Plain]]:
    """Return the settings that are not the same in all runs; None where a run has no such one."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _domain(run: Run) -> str:
    """Return the package of the pipeline's class: what its samples are depends on it."""
    pipeline = run.config.get("pipeline")
    path = pipeline.get("class_path", "") if isinstance(pipeline, Mapping) else str(pipeline)
    parts = str(path).split(".")
    return parts[1] if parts[0] == "domains" and len(parts) > 2 else str(path)


def _test(folder: Path) -> str:
    """Return the command that makes a test's files."""
    return (
        f"`lit-rlft test --config {folder}/{CONFIG} --ckpt_path {folder}/checkpoints/last.ckpt` "
        "writes it"
    )
