"""Same-seed before/after panels at every validation."""

import torch
from lightning import Callback, LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import at_least
from lit_rlft.runs.before_after import before_after, write_png
from lit_rlft.runs.folder import run_folder, summary_writer

__all__ = ["SamplePanel"]


class SamplePanel(Callback):
    """Shows validation samples of the reference above the tuned model's, from the same noise.

    The panel goes to TensorBoard and to `panels/` in the run's folder.

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
        evaluator.num_pictures = max(evaluator.num_pictures, self.num_samples)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the panel of what was just drawn."""
        assert isinstance(pl_module, RewardFineTuner)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        measurements = pl_module.evaluator.measurements
        arms = [
            torch.cat([arm.pictures[i] for i in sorted(arm.pictures)])[: self.num_samples]
            for arm in (measurements.reference, measurements.tuned)
        ]
        panel = before_after(arms[0], arms[1], self.num_columns)
        write_png(panel, run_folder(trainer) / "panels" / f"{pl_module.num_updates:06d}.png")
        writer = summary_writer(pl_module)
        if writer is not None:
            writer.add_image("val/before_after", panel, pl_module.num_updates)
