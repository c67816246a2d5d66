"""Same-seed before/after panels at every validation."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.logged import log_picture
from lit_rlft.core.checks import at_least
from lit_rlft.evaluation.exploitation import guards_of
from lit_rlft.evaluation.kept import first_entries, first_of_all
from lit_rlft.runs.before_after import before_after, comparison, write_png
from lit_rlft.runs.files import writing
from lit_rlft.runs.folder import run_folder
from lit_rlft.runs.lines import without_nan
from lit_rlft.runs.shown import SHOWN, write_shown

__all__ = ["SamplePanel"]


class SamplePanel(Callback):
    """Shows validation samples of the reference above the tuned model's, from the same noise.

    The panel goes to `panels/` in the run's folder and, with its conditions, to TensorBoard and
    Weights & Biases. A fit also keeps the samples, small, with what was measured of them: a report
    shows them side by side (`report/*.json.gz`).

    Args:
        num_samples: Samples shown.
        num_columns: Samples in a row.
    """

    def __init__(self, num_samples: int = 24, num_columns: int = 12) -> None:
        at_least(1, self, num_samples=num_samples, num_columns=num_columns)
        self.num_samples, self.num_columns = num_samples, num_columns

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the pictures."""
        assert isinstance(pl_module, RewardFineTuner)
        evaluator = pl_module.evaluator
        evaluator.show(self.num_samples)
        evaluator.keeps_figures = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the panel of what was just drawn."""
        assert isinstance(pl_module, RewardFineTuner)
        if trainer.sanity_checking:
            return
        own, size = pl_module.evaluator.measurements, trainer.world_size
        measurements = first_of_all(own, self.num_samples, size)
        if not trainer.is_global_zero:
            return
        both = (measurements.reference, measurements.tuned)
        arms = [arm.all_pictures()[: self.num_samples] for arm in both]
        folder, updates = run_folder(trainer), pl_module.num_updates
        panel = before_after(arms[0], arms[1], self.num_columns)
        write_png(panel, folder / "panels" / f"{updates:06d}.png")
        labels = measurements.tuned.all_labels()[: self.num_samples]
        size, title = min(pl_module.num_eval_samples, len(labels)), _title(pl_module)
        starts = range(0, len(labels) - size + 1, size)[: self.num_columns]
        shown = arms[0], arms[1], labels, [*starts, min(size, 4)], title
        log_picture(pl_module, "val/before_after", comparison(*shown), title, updates)
        if trainer.state.fn == TrainerFn.FITTING:
            path = folder / SHOWN / f"{updates:06d}.json.gz"
            with writing(path):
                entries = first_entries(measurements, self.num_samples, pl_module.num_eval_samples)
                write_shown(path, _record(pl_module, entries))


def _title(module: RewardFineTuner) -> str:
    """Return one line: which model it is, and its reward before and after."""
    latest, name = module.evaluator.latest, module.reward.name
    before, after = (latest[arm].get(name, {}).get("mean") for arm in ("reference", "tuned"))
    gain = "" if before is None or after is None else f", {name} {before:.4g} -> {after:.4g}"
    return f"{module.algorithm} after {module.num_updates} updates{gain}"


def _record(module: RewardFineTuner, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a report shows of a checkpoint: its numbers and some samples."""
    evaluator = module.evaluator
    guards = guards_of(module.reward, module.metrics)
    return {
        "reward": module.reward.name,
        "updates": module.num_updates,
        "rounds": module.num_rounds,
        "samples": module.num_samples,
        "reward_calls": module.meter.total("reward_calls"),
        "seconds": module.meter.training.seconds,
        "guards": {name: guard.worse for name, guard in guards.items()},
        "summary": without_nan(evaluator.latest),
        "entries": entries,
    }
