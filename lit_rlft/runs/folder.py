"""The folder that a run writes to, and its TensorBoard log."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.agreement import agreed, is_first
from lit_rlft.runs.files import clean, writing
from lit_rlft.runs.lock import RunLock

_NAME = "LIT_RLFT_RUN_NAME"
_NO_CHECKPOINTS = "checkpoint.save_last to false and checkpoint.save_top_k to 0"
_OWN_SETTINGS = {
    "gradient_clip_val": (None, "model.init_args.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.init_args.max_grad_norm, which bounds the norm"),
    "accumulate_grad_batches": (1, "model.init_args.minibatch_size and microbatch_size"),
    "enable_checkpointing": (True, _NO_CHECKPOINTS),
    "barebones": (False, f"{_NO_CHECKPOINTS}, trainer.logger to false"),
}
"""Lightning's settings that do not apply: those that do nothing, and what takes their place."""

_OF_STAGE = {"validate": "limit_val_batches", "test": "limit_test_batches"}
_OF_STAGE |= {"predict": "limit_predict_batches"}
"""Lightning's setting that leaves a command nothing to do where it is 0."""

_FOLDER, _SCRATCH = "_lit_rlft_run_folder", "_lit_rlft_scratch"
"""Attributes of a trainer: the folder it was given, and that of a fast_dev_run."""

_OF_WINDOWS = ':<>"|?*'
"""Characters that no name of a file has there."""

_WRITTEN = ("panels", "samples", "tuned", "report")
"""Folders in a run's own, beside that of the checkpoints."""

__all__ = [
    "check_name",
    "checkpoints_of",
    "give_folder",
    "has_given_folder",
    "make_folder",
    "run_folder",
    "spelled_out",
    "summary_writer",
    "trainer_settings",
    "writes_nothing",
]


def make_folder(config: Namespace, stage: str, lock: ExitStack | None = None) -> Path:
    """Make and return the folder of the run that a command's config asks for.

    Of several processes that a launcher started, the first one chooses and makes it. A
    fast_dev_run makes none.

    Args:
        config: Of the command.
        stage: Which command it is.
        lock: A fit holds the folder's lock until this is closed; None takes no lock.

    Raises:
        UsageError: The name is none of a folder, the folder cannot be written, `fit` would mix a
            new run into an old one, another fit writes there, a file stands where it writes a
            folder, the trainer is asked for something that the model does itself, or for nothing.
    """
    for key, (default, remedy) in _OWN_SETTINGS.items():
        if config.trainer[key] not in (None, default):
            raise UsageError(f"trainer.{key} does not apply here; set {remedy}")
    if (limit := _OF_STAGE.get(stage)) and config.trainer[limit] == 0:
        raise UsageError(f"trainer.{limit} is 0, so {stage} would do nothing; raise it")
    check_name(config.name)
    folder = Path(config.root) / agreed(lambda: _prepare(config, stage, lock))
    if not config.trainer["fast_dev_run"]:
        _make(folder)
    return folder


def checkpoints_of(config: Namespace, folder: Path) -> Path:
    """Return where the checkpoints of a run lie."""
    given = config.checkpoint["dirpath"]
    return Path(given) if given else folder / "checkpoints"


def give_folder(trainer: Trainer, folder: Path) -> None:
    """Make a folder that of the trainer's run, whatever loggers it has."""
    vars(trainer)[_FOLDER] = folder


def has_given_folder(trainer: Trainer) -> bool:
    """Return whether the trainer was given its folder, as that of a command is."""
    return _FOLDER in vars(trainer)


def trainer_settings(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Complete the trainer's settings: the run's folder and its logger."""
    settings: dict[str, Any] = {"default_root_dir": given["default_root_dir"] or str(folder)}
    if given["logger"] in (None, True):
        settings["logger"] = TensorBoardLogger(folder.parent, name=folder.name, version="")
    return settings


def writes_nothing(trainer: Trainer) -> bool:
    """Return whether it is a fast_dev_run, which tries everything and leaves no file."""
    return bool(vars(trainer).get("fast_dev_run", False))


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run: as given, else the logger's, else the trainer's root.

    A fast_dev_run leaves nothing: its folder is a temporary one. Unlike `trainer.log_dir` this may
    be called on one process alone.
    """
    own = vars(trainer)
    if writes_nothing(trainer):
        if _SCRATCH not in own:
            own[_SCRATCH] = mkdtemp(prefix="lit_rlft_")
            finalize(trainer, rmtree, own[_SCRATCH], ignore_errors=True)
        return Path(own[_SCRATCH])
    if _FOLDER in own:
        return Path(own[_FOLDER])
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


def spelled_out(root: str) -> str:
    """Return a path with the user's home and variables in place, as the logger would write it."""
    return os.path.expandvars(Path(root).expanduser())


def check_name(name: str | None) -> None:
    """Raise UsageError for a name that is not that of one folder below the root."""
    if name is None:
        return
    reserved = f"${_OF_WINDOWS}" if sys.platform == "win32" else "$"
    others = any(c in f"/\\{reserved}" or c < " " for c in name)
    if not name.strip() or name in (".", "..") or others:
        raise UsageError(
            f"name must be that of a folder in root, without separators and {reserved}, got "
            f"{name!r}; set root to write elsewhere"
        )


def _prepare(config: Namespace, stage: str, lock: ExitStack | None) -> str:
    """Choose the folder's name; make it, take its lock, and refuse one that holds a run."""
    trial = bool(config.trainer["fast_dev_run"])
    name = config.name or _free_name(config, make=not trial)
    folder = Path(config.root) / name
    if trial or not is_first():  # started by Lightning: its first process has done all this
        return str(name)
    checkpoints = checkpoints_of(config, folder)
    _make(folder)
    _check_folders(folder, checkpoints)
    if stage == "fit" and lock is not None:
        _lock(RunLock(folder), lock)
        if not checkpoints.is_relative_to(folder):
            _make(checkpoints)
            _lock(RunLock(checkpoints, "checkpoint.dirpath"), lock)
        clean(folder)
    if stage == "fit" and config.ckpt_path is None:
        _check_fresh(folder, checkpoints)
    return str(name)


def _lock(held: RunLock, until: ExitStack) -> None:
    """Hold a folder's lock until the stack is closed."""
    with writing(held.path):
        held.acquire()
    until.callback(held.release)


def _check_folders(folder: Path, checkpoints: Path) -> None:
    """Raise UsageError where a file stands in the place of a folder that the run writes to."""
    for path in (checkpoints, *(folder / name for name in _WRITTEN)):
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(
                f"{path} is no folder, but the run writes one there; move it away, or choose "
                f"another {'--name' if path.parent == folder else 'checkpoint.dirpath'}"
            )


def _check_fresh(folder: Path, checkpoints: Path) -> None:
    """Raise UsageError where a new run would be mixed into an old one, and say how to resume it.

    A run that was killed before its first checkpoint left nothing to resume: it starts again.
    """
    saved = (*folder.glob("hpc_ckpt_*.ckpt"), *checkpoints.glob("*.ckpt"))
    found = sorted(saved, key=_newest)
    if not found and (folder / "tuned").exists():
        raise UsageError(
            f"{folder} already holds a run that kept no checkpoint; choose another --name, or "
            "delete it"
        )
    if not found:
        return
    if checkpoints.parent == folder:
        raise UsageError(
            f"{folder} already holds a run; choose another --name, delete it, or resume it with "
            f"--ckpt_path {found[-1]}"
        )
    raise UsageError(
        f"checkpoint.dirpath {checkpoints} already holds a run's checkpoints; choose another "
        f"folder, or resume that run with --ckpt_path {found[-1]}"
    )


def _newest(path: Path) -> tuple[bool, float]:
    """Sort last.ckpt behind all others, and those by their time."""
    return path.stem == "last", path.stat().st_mtime


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"the run folder {folder} cannot be written; choose another --root")


def _free_name(config: Namespace, *, make: bool) -> str:
    if "LOCAL_RANK" in os.environ and _NAME in os.environ:
        # A process that Lightning launched: the first one has chosen, and may have made the folder.
        return os.environ[_NAME]
    algorithm = config.model.class_path.rpartition(".")[2].lower()
    names = [algorithm, *(f"{algorithm}-{i}" for i in range(2, 10_000))]
    os.environ[_NAME] = next(n for n in names if _is_new(Path(config.root) / n, make=make))
    return os.environ[_NAME]


def _is_new(folder: Path, *, make: bool) -> bool:
    """Make a folder; return False where there is one, also where another run makes it just now."""
    if not make:
        return not folder.exists()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError:  # for `_make` to explain
        return not folder.exists()
    return True
