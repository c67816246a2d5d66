"""The files of a test that a report is made of, and the report."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.dial_file import DIAL
from lit_rlft.callbacks.facts import say
from lit_rlft.core.checks import at_least
from lit_rlft.distributed import gather
from lit_rlft.evaluation.kept import KINDS, Extremes, merged
from lit_rlft.evaluation.measurements import Measured, Measurements
from lit_rlft.report import REPORT, write_report
from lit_rlft.runs.files import write_whole, writing
from lit_rlft.runs.folder import run_folder, writes_nothing
from lit_rlft.runs.results import SAMPLES
from lit_rlft.runs.shown import SHOWN, TEST, write_shown

__all__ = ["OF_A_TEST", "ReportFiles"]

OF_A_TEST = (SAMPLES, REPORT, f"{SHOWN}/{TEST}", DIAL)
"""Files of one checkpoint's test, relative to the run's folder."""


class ReportFiles(Callback):
    """Writes a test's values of each sample, its best, worst and most changed ones, and the report.

    `test_samples.csv` has a line per sample: `row` and `sample` (the data's row and which of its
    samples), `label`, and every measurement as `<arm>/<metric>`. `report.html` opens by double
    click.

    Args:
        enabled: Whether to write the report; the values are written in any case.
        num_samples: Best, worst and most changed samples that are kept, of each.
    """

    def __init__(self, enabled: bool = True, num_samples: int = 8) -> None:
        at_least(1, self, num_samples=num_samples)
        self.enabled, self.num_samples = enabled, num_samples
        self._extremes: Extremes | None = None
        self._told = ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at all samples."""
        assert isinstance(pl_module, RewardFineTuner)
        name, per_condition = pl_module.reward.name, pl_module.num_eval_samples
        found = Extremes(pl_module.pipeline, name, self.num_samples, per_condition)
        pl_module.evaluator.seen = found.see
        self._extremes = found

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files; nothing measured is lost where a report cannot be made."""
        assert isinstance(pl_module, RewardFineTuner) and self._extremes is not None
        pl_module.evaluator.seen = None
        size, measurements = trainer.world_size, pl_module.evaluator.measurements
        found = gather(self._extremes.found, size)
        table = _table(measurements, size)
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        entries: list[dict[str, Any]] = []
        for kind in KINDS:
            best = merged([own[kind] for own in found], self.num_samples)
            entries += [{**entry, "kind": kind} for _, entry in best]
        record = {"reward": pl_module.reward.name, "seed": pl_module.seed, "entries": entries}
        with writing(folder / SAMPLES):
            write_whole(folder / SAMPLES, table)
        with writing(folder / SHOWN / TEST):
            write_shown(folder / SHOWN / TEST, record)
        if self.enabled and not writes_nothing(trainer):
            self._told = _write(folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the report is, below the result."""
        if self._told:
            say(self._told)
            self._told = ""


def _write(folder: Path) -> str:
    """Write the report; return a line that says where it is, or why there is none."""
    try:
        return f"report   {write_report([folder], folder / REPORT)}"
    except Exception as error:  # the test is over and written: a page must not make it fail
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"no report was written: {reason}; `lit-rlft report {folder}` tries again"


def _table(measurements: Measurements, world_size: int) -> str:
    """Return the values of every sample of every process as CSV, in the order of the data."""
    own = {arm: _columns(measured) for arm, measured in measurements.arms.items()}
    tuned = measurements.tuned
    parts = gather((tuned.all_rows(), tuned.all_labels(), own), world_size)
    rows = torch.cat([part[0] for part in parts])
    order = rows.argsort(stable=True).tolist()
    texts = [label for part in parts for label in part[1]]
    names = [
        (arm, name)
        for arm, columns in parts[0][2].items()
        for name in columns
        if all(name in part[2].get(arm, {}) for part in parts)
    ]
    values = [torch.cat([part[2][arm][name] for part in parts]).tolist() for arm, name in names]
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["row", "sample", "label", *(f"{arm}/{name}" for arm, name in names)])
    seen: dict[int, int] = {}
    for i in order:
        row = int(rows[i])
        number = seen[row] = seen.get(row, -1) + 1
        numbers = [f"{x[i]:.9g}" if x[i] == x[i] else "" for x in values]
        out.writerow([row, number, texts[i], *numbers])
    return buffer.getvalue()


def _columns(measured: Measured) -> dict[str, Tensor]:
    """Return the measurements that every sample of a model has."""
    count = len(measured.all_rows())
    return {name: x for name, x in measured.columns().items() if len(x) == count}
