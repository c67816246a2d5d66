"""The folder that a run writes to, and its TensorBoard log."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.core.checks import UsageError

_NAME = "LIT_RLFT_RUN_NAME"
_OWN_SETTINGS = {
    "gradient_clip_val": (None, "max_grad_norm"),
    "accumulate_grad_batches": (1, "minibatch_size and microbatch_size"),
}
"""Lightning's settings of automatic optimisation: their defaults, and what takes their place."""

__all__ = ["make_folder", "run_folder", "summary_writer", "trainer_settings"]


def make_folder(config: Namespace, stage: str) -> Path:
    """Make and return the folder of the run that a command's config asks for.

    Raises:
        UsageError: The folder cannot be written, `fit` would mix a new run into an old one, or the
            trainer is asked for something that the model does itself.
    """
    for key, (default, remedy) in _OWN_SETTINGS.items():
        if config.trainer[key] != default:
            raise UsageError(f"trainer.{key} does not apply here; set model.init_args.{remedy}")
    folder = Path(config.root) / (config.name or _free_name(config))
    _check_folder(folder, fresh=stage == "fit" and config.ckpt_path is None)
    return folder


def trainer_settings(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Complete the trainer's settings: the run's folder and its logger."""
    settings: dict[str, Any] = {"default_root_dir": given["default_root_dir"] or str(folder)}
    if given["logger"] in (None, True):
        settings["logger"] = TensorBoardLogger(folder.parent, name=folder.name, version="")
    return settings


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run: the logger's, or the trainer's root without one.

    Unlike `trainer.log_dir` it may be called on one process alone.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.default_root_dir)


def summary_writer(module: LightningModule) -> SummaryWriter | None:
    """Return the TensorBoard writer of the main process, or None where there is none."""
    if not module.trainer.is_global_zero:
        return None
    for logger in module.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def _check_folder(folder: Path, *, fresh: bool) -> None:
    if fresh and (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder} already holds a run; choose another --name, delete it, or resume it with "
            f"--ckpt_path {folder}/checkpoints/last.ckpt"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"the run folder {folder} cannot be written; choose another --root")


def _free_name(config: Namespace) -> str:
    if "LOCAL_RANK" in os.environ and _NAME in os.environ:
        # A process that Lightning launched: the first one has chosen, and may have made the folder.
        return os.environ[_NAME]
    algorithm = config.model.class_path.rpartition(".")[2].lower()
    names = [algorithm, *(f"{algorithm}-{i}" for i in range(2, 10_000))]
    os.environ[_NAME] = next(n for n in names if not (Path(config.root) / n).exists())
    return os.environ[_NAME]
