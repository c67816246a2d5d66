"""A trainer on one device that writes and prints nothing, as measurements need it."""

from typing import Any

from lightning import Trainer

__all__ = ["quiet_trainer"]


def quiet_trainer(**settings: Any) -> Trainer:
    """Return a trainer without logger, checkpoints, progress bars and summary.

    Args:
        **settings: Others of Lightning's `Trainer`; on the CPU unless they say so.
    """
    return Trainer(
        **{"accelerator": "cpu", **settings},
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
