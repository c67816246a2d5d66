"""A trainer on one device that writes and prints nothing, as measurements need it."""

from typing import Any

from lightning import Trainer

__all__ = ["quiet_trainer"]


def quiet_trainer(accelerator: str = "cpu", **settings: Any) -> Trainer:
    """Return a trainer without logger, checkpoints, progress bars and summary.

    Args:
        accelerator: Where it runs.
        **settings: Others of Lightning's `Trainer`.
    """
    return Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
