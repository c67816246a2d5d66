"""Checkpoint files: read without running anything that they hold, or refused in one sentence.

A pickle can run code when it is loaded. Only what torch's safe loader takes (numbers, strings,
tensors and containers of them) is ever loaded, under any `weights_only`.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import IO, Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.cloud_io import _load as lightning_load

from lit_rlft.core.checks import UsageError

__all__ = ["COUNTERS", "check_file", "load", "secure"]

COUNTERS = ("num_rounds", "num_samples", "num_updates")
_NEEDED = {
    **dict.fromkeys(COUNTERS, int),
    "pretrained": str,
    "pipeline": str,
    "cost": dict,
    "settings": dict,
}
"""What every checkpoint says of its run, and the types; those of 0.2 have no settings."""
_RESUMED = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
_HYPER_PARAMETERS = (
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "hparams",
    "module_arguments",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)
"""Where Lightning looks for settings and class paths. Settings are the user's, never a file's."""

_PATHS = {"best_model_path", "kth_best_model_path", "last_model_path"}
"""In the states of Lightning's checkpoint callbacks."""
_ZIP = b"PK\x03\x04"
"""How files of torch begin."""

Source = str | Path | IO[bytes]


def check_file(path: str | Path, *, resuming: bool = False) -> dict[str, Any]:
    """Check a checkpoint before anything else is loaded; return it, mapped into memory.

    Args:
        path: Of the file.
        resuming: Whether a fit is to go on from it.

    Raises:
        UsageError: The file is missing or damaged, was not written by lit-rlft, or holds too little
            to resume from.
    """
    with _reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    checkpoint = _checked(checkpoint, path)
    if resuming:
        check_resumable(checkpoint)
    return checkpoint


def load(path: Source, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint that lit-rlft wrote; nothing in it is run.

    Args:
        path: Of the file, or the file itself.
        map_location: As of `torch.load`.

    Raises:
        UsageError: The file is missing or damaged, or was not written by lit-rlft.
    """
    with _reading(path):
        checkpoint = lightning_load(path, map_location, weights_only=True)
    return _checked(checkpoint, path)


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise UsageError where a checkpoint holds weights, but not the state of a fit."""
    if any(key not in checkpoint for key in _RESUMED):
        raise UsageError(
            "the checkpoint holds weights alone (checkpoint.save_weights_only), which test and "
            "predict take, but no fit can go on from; resume from one that was saved with "
            "checkpoint.save_weights_only false"
        )


def secure(trainer: Trainer) -> None:
    """Make a trainer load checkpoints safely, under every name and by every plugin."""
    strategy = trainer.strategy
    if not isinstance(getattr(strategy, "load_checkpoint", None), partial):
        vars(strategy)["load_checkpoint"] = partial(_safely, strategy.load_checkpoint)


def _safely(
    inner: Callable[..., Any], checkpoint_path: Source, weights_only: bool | None = None
) -> dict[str, Any]:
    # Always safely; strategies that were written for Lightning 2.5 have no argument for it.
    if "weights_only" not in signature(inner).parameters:
        return load(checkpoint_path)
    with _reading(checkpoint_path):
        checkpoint = inner(checkpoint_path, weights_only=True)
    return _checked(checkpoint, checkpoint_path)


@contextmanager
def _reading(path: Source) -> Iterator[None]:
    if isinstance(path, str | Path) and Path(path).is_dir():
        raise UsageError(f"the checkpoint {path} is a folder; give a file, such as last.ckpt in it")
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"the checkpoint cannot be loaded: there is no file {path}") from error
    except PermissionError as error:
        raise UsageError(f"the checkpoint {path} cannot be read: permission denied") from error
    except Exception as error:  # a file can hold anything, and the reader has many errors
        reason = _reason(path, error)
        raise UsageError(f"{path} is no checkpoint of lit-rlft{reason}") from error


def _reason(path: Source, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "; it holds more than numbers and tensors, and such files are never loaded"
    if isinstance(path, str | Path) and Path(path).is_file():
        with Path(path).open("rb") as file:
            if file.read(len(_ZIP)) == _ZIP:
                return ", or it is cut off or damaged; take another file of the run"
    return ""


def _checked(checkpoint: Any, path: Source) -> dict[str, Any]:
    """Return a checkpoint of ours without Lightning's hyper-parameters."""
    ours = checkpoint.get("lit_rlft") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise UsageError(f"{path} is no checkpoint of lit-rlft; it names no pipeline")
    weights = checkpoint.get("state_dict")
    whole = all(
        isinstance(({"settings": {}} | ours).get(name), kind) for name, kind in _NEEDED.items()
    )
    if not whole or not isinstance(weights, dict):
        raise UsageError(f"the checkpoint {path} is damaged; take another file of the run")
    for key in _HYPER_PARAMETERS:
        checkpoint.pop(key, None)
    states = checkpoint.get("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if isinstance(state, dict):
            _disarm(state)
    return checkpoint


def _disarm(state: dict[str, Any]) -> None:
    """Forget paths outside the folder of checkpoints: Lightning deletes what they name."""
    folder = state.get("dirpath")

    def within(path: Any) -> bool:
        if not isinstance(path, str) or not isinstance(folder, str) or "://" in path:
            return False
        return Path(path).is_relative_to(folder) and ".." not in Path(path).parts

    for key in _PATHS & state.keys():
        state[key] = state[key] if within(state[key]) else ""
    if isinstance(models := state.get("best_k_models"), dict):
        state["best_k_models"] = {path: score for path, score in models.items() if within(path)}
