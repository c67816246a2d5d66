"""Which checkpoint a command takes: the one that was named, or the last one of the run."""

import os
import re
from pathlib import Path

from jsonargparse import Namespace

from lit_rlft.callbacks.facts import say
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.checkpoint_file import check_file, load
from lit_rlft.runs.folder import check_name, checkpoints_of

__all__ = ["NONE", "choose"]

NONE = "none"
"""The value of --ckpt_path that asks for the pretrained model as it is."""


def choose(config: Namespace, stage: str) -> str | None:
    """Return the path of the checkpoint that a command takes, `NONE`, or None for a new fit.

    The file is checked; one line says what a command takes that was not told.

    Raises:
        UsageError: There is no such checkpoint, or it is none that may be loaded.
    """
    check_name(config.name)
    given = None if config.ckpt_path is None else str(config.ckpt_path)
    folder = Path(config.root) / (config.name or "")
    found: str | Path | None = given
    if given in ("last", "best", "hpc"):
        found = _named(given, config, folder, stage)
    elif stage == "fit" and given == NONE:
        found = None
    elif given is None or (stage == "fit" and _has_begun(given, config, folder)):
        found = _default(config, folder, stage) or given
    if found is None or found == NONE:
        _tell_untuned(config, stage, asked=given == NONE)
        return None if stage == "fit" else NONE
    check_file(found, resuming=stage == "fit")
    if str(found) != given:
        say(f"checkpoint: {found}")
    return str(found)


def _default(config: Namespace, folder: Path, stage: str) -> Path | None:
    """Return a run's last checkpoint; for a fit where SLURM has started its job again."""
    known = config.name or _elsewhere(config)
    requeued = "SLURM_JOB_ID" in os.environ and bool(_of_slurm(config, folder))
    goes_on = known and (stage != "fit" or requeued or _started_again())
    return _last(config, folder) if goes_on else None


def _has_begun(given: str, config: Namespace, folder: Path) -> bool:
    """Return whether a job is started again whose first start began from another run's file."""
    own = [path.resolve() for path in (folder, checkpoints_of(config, folder))]
    return _started_again() and not any(map(Path(given).resolve().is_relative_to, own))


def _started_again() -> bool:
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _of_slurm(config: Namespace, folder: Path) -> list[Path]:
    """Return what Lightning saved of a run before SLURM requeued it, the newest at the end."""
    root = Path(config.trainer["default_root_dir"] or folder)
    return sorted(root.glob("hpc_ckpt_*.ckpt"), key=_number)


def _elsewhere(config: Namespace) -> bool:
    return config.checkpoint["dirpath"] is not None


def _named(name: str, config: Namespace, folder: Path, stage: str) -> Path | None:
    """Return the file that Lightning would look up under a name.

    Raises:
        UsageError: There is none. A fit may ask for "last" before there is any.
    """
    if not config.name and not _elsewhere(config):
        raise UsageError(f"ckpt_path {name} is that of a run: give its --name, or a file's path")
    checkpoints = checkpoints_of(config, folder)
    if name == "last":
        found = _last(config, folder)
    elif name == "best":
        found = _best(checkpoints)
    else:
        found = next(reversed(_of_slurm(config, folder)), None)
    if found is None and (name, stage) != ("last", "fit"):
        where = folder if name == "hpc" else checkpoints
        raise UsageError(f"ckpt_path {name}: there is no such checkpoint in {where}")
    return found


def _last(config: Namespace, folder: Path) -> Path | None:
    """Return a run's last checkpoint, or what was saved for SLURM where that has come further."""
    last, saved = _newest(checkpoints_of(config, folder)), _of_slurm(config, folder)
    known = [*saved, *([] if last is None else [last])]
    if len(known) < 2:
        return known[0] if known else None
    return max(reversed(known), key=lambda path: check_file(path)["lit_rlft"]["num_rounds"])


def _newest(folder: Path) -> Path | None:
    """Return the newest of a folder's last.ckpt (older versions numbered them), or of all."""
    for pattern in ("last*.ckpt", "*.ckpt"):
        files = [path for path in folder.glob(pattern) if path.is_file()]
        if files:
            return max(files, key=lambda path: (path.stat().st_mtime, path.name))
    return None


def _best(folder: Path) -> Path | None:
    """Return the checkpoint that the last one names as the best by what was monitored.

    Raises:
        UsageError: Nothing was monitored.
    """
    last = _newest(folder)
    if last is None:
        return None
    for state in load(last).get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            return folder / Path(str(state["best_model_path"])).name
    raise UsageError(
        "ckpt_path best: the run monitored nothing to be the best by; set checkpoint.monitor and "
        "checkpoint.mode in fit, or give a file's path"
    )


def _number(path: Path) -> int:
    return int("".join(re.findall(r"\d+", path.stem)) or 0)


def _tell_untuned(config: Namespace, stage: str, *, asked: bool) -> None:
    """Say that a command takes the pretrained model as it is, and why."""
    folder = Path(config.root) / (config.name or "")
    checkpoints = checkpoints_of(config, folder)
    if stage == "fit":
        if config.ckpt_path == "last":
            say(f"checkpoint: none yet in {checkpoints}; the fit starts anew")
        return
    if asked:
        why = "as --ckpt_path none asks"
    elif config.name or _elsewhere(config):
        why = f"there is none in {checkpoints}"
    else:
        why = "give a run's --name to take its last one, or --ckpt_path"
    say(f"checkpoint: none, the model is untuned ({why})")
