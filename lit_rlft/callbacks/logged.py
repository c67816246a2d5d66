"""Pictures, texts and settings for the loggers that take them; numbers go to all by themselves."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from jsonargparse import Namespace
from lightning import LightningModule
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.folder import summary_writer

_PACKAGES = {
    "WandbLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
}
"""What Lightning's loggers need beside itself."""

__all__ = ["check_loggers", "log_picture", "log_settings", "log_text"]

Plain = bool | int | float | str


def check_loggers(given: Any) -> None:
    """Raise UsageError where a logger's package is not installed.

    Args:
        given: `trainer.logger` of a config: a class with its path, a list of them, or anything.
    """
    for one in given if isinstance(given, list) else [given]:
        path = str(one.get("class_path", "")) if isinstance(one, Mapping | Namespace) else ""
        name = path.rpartition(".")[2]
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise UsageError(
                f"trainer.logger: {name} needs the package {package}, which is not installed: pip "
                f"install {package}, or take TensorBoardLogger or CSVLogger"
            )


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
    """
    writer = summary_writer(module)
    if writer is not None and writer.file_writer is not None:
        _, start, _ = hparams(dict(settings), {})
        writer.file_writer.add_summary(start)
    if not module.trainer.is_global_zero:
        return
    for logger in module.trainer.loggers:
        if isinstance(logger, WandbLogger | CSVLogger):
            logger.log_hyperparams(dict(settings))


def _wandb(module: LightningModule) -> list[WandbLogger]:
    if not module.trainer.is_global_zero:
        return []
    return [logger for logger in module.trainer.loggers if isinstance(logger, WandbLogger)]
