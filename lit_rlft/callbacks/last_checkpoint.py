"""Keeps the end of a fit, which Lightning's own callback loses after a validation."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_rlft.runs.folder import writes_nothing

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose last.ckpt is that of the last round.

    Lightning's saves after validations and, at the end, only where it never saved: rounds after
    the last validation would be missing. An earlier fit's last.ckpt is replaced: Lightning's would
    write last-v1.ckpt beside it. Other checkpoints keep their version counter.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the last save."""
        if writes_nothing(trainer):  # the base class would save nevertheless
            return
        super().on_train_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        counting, self._enable_version_counter = self._enable_version_counter, False
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        finally:
            self._enable_version_counter = counting
