"""Keeps the end of a fit, which Lightning's own callback loses after a validation."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose last.ckpt is that of the last round.

    Lightning's saves after validations and, at the end, only where it never saved: rounds after
    the last validation would be missing.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the last save."""
        super().on_train_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
