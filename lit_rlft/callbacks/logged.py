"""Pictures, texts and settings for the loggers that take them; numbers go to all by themselves."""

from collections.abc import Mapping, Sequence

import numpy as np
from lightning import LightningModule
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.folder import summary_writer

__all__ = ["log_picture", "log_settings", "log_text"]

Plain = bool | int | float | str


def log_picture(
    module: LightningModule, name: str, picture: Image.Image, caption: str, step: int
) -> None:
    """Show a picture in TensorBoard and, with its caption, in Weights & Biases.

    Args:
        module: Whose trainer has the loggers.
        name: The same for all loggers.
        picture: TensorBoard has no captions: what a viewer needs stands in it.
        caption: One line.
        step: Number of optimiser steps.
    """
    writer = summary_writer(module)
    if writer is not None:
        writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    for logger in _wandb(module):
        logger.log_image(name, [picture], caption=[caption])


def log_text(module: LightningModule, name: str, texts: Sequence[str], step: int) -> None:
    """Show texts in TensorBoard and in Weights & Biases.

    Args:
        module: Whose trainer has the loggers.
        name: The same for all loggers.
        texts: A paragraph each.
        step: Number of optimiser steps.
    """
    writer = summary_writer(module)
    if writer is not None:
        writer.add_text(name, "\n\n".join(texts), step)
    for logger in _wandb(module):
        logger.log_text(name, columns=["step", "text"], data=[[str(step), t] for t in texts])


def log_settings(module: LightningModule, settings: Mapping[str, Plain]) -> None:
    """Give loggers the settings of a run: TensorBoard's HParams, and others' hyperparameters.

    TensorBoard gets them without a list of metrics: it then joins the settings of all runs, finds
    those that differ, and offers every scalar as a column. With a list it takes the first run's.

    Args:
        module: Whose trainer has the loggers.
        settings: By key.

    Raises:
        UsageError: Weights & Biases is asked for and not installed.
    """
    writer = summary_writer(module)
    if writer is not None and writer.file_writer is not None:
        _, start, _ = hparams(dict(settings), {})
        writer.file_writer.add_summary(start)
    if not module.trainer.is_global_zero:
        return
    for logger in module.trainer.loggers:
        if isinstance(logger, WandbLogger | CSVLogger):
            try:
                logger.log_hyperparams(dict(settings))
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"trainer.logger: {type(logger).__name__} needs the package {error.name}; "
                    f"pip install {error.name}, or take TensorBoardLogger or CSVLogger"
                ) from error


def _wandb(module: LightningModule) -> list[WandbLogger]:
    if not module.trainer.is_global_zero:
        return []
    return [logger for logger in module.trainer.loggers if isinstance(logger, WandbLogger)]
