"""The optimiser and its learning-rate schedule: made from settings, stepped, checked."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_rlft.core.checks import UsageError

__all__ = ["after_round", "after_update", "after_validation", "optimizer_of"]

_KEY = "model.init_args.optimizer.init_args"
_SETTINGS = {
    "learning rate": "lr",
    "weight_decay": "weight_decay",
    "beta": "betas",
    "epsilon": "eps",
    "momentum": "momentum",
}
"""What torch's optimisers call their arguments in errors."""
_MONITOR = "model.init_args.lr_scheduler.init_args.monitor"
_SOMETIMES = ("train/loss", "train/reward")
"""What a round lacks that made no update, or of which no sample has a reward."""


def optimizer_of(
    parameters: Sequence[nn.Parameter],
    optimizer: OptimizerCallable,
    scheduler: LRSchedulerCallable | None,
    trainer: Trainer,
) -> Any:
    """Return what `LightningModule.configure_optimizers` returns.

    Args:
        parameters: What is trained.
        optimizer: From parameters to an optimiser.
        scheduler: From the optimiser to a schedule; None keeps the learning rate.
        trainer: Whose validations a schedule may wait for.

    Raises:
        UsageError: The optimiser cannot have such settings, or the schedule waits for a value that
            is never logged.
    """
    try:
        own = optimizer(parameters)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        named = next((key for word, key in _SETTINGS.items() if word in str(error).lower()), "")
        key = f"{_KEY}.{named}" if named else _KEY
        raise UsageError(f"{key}: {error}; change it") from error
    _check(own)
    if scheduler is None:
        return own
    try:
        schedule = scheduler(own)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        key = "model.init_args.lr_scheduler.init_args"
        raise UsageError(f"{key}: {error}; change it") from error
    if isinstance(schedule, ReduceLROnPlateau):
        _check_monitor(_monitor(schedule), trainer)
    # Steps are taken here; a LearningRateMonitor looks after each of them by this word.
    return [own], [{"scheduler": schedule, "interval": "step"}]


def after_update(schedule: Any) -> None:
    """Step a schedule that goes by the number of updates.

    Raises:
        UsageError: It ends with an earlier update, as `OneCycleLR` does.
    """
    if isinstance(schedule, LRScheduler) and not isinstance(schedule, ReduceLROnPlateau):
        try:
            schedule.step()
        except ValueError as error:
            if "total steps" not in str(error):  # of a function of the user's
                raise
            raise UsageError(
                f"model.init_args.lr_scheduler.init_args: the fit has more updates than its "
                f"schedule ({error}); make it longer, and resume with --ckpt_path"
            ) from error


def after_round(schedule: Any, means: Mapping[str, float]) -> None:
    """Step a schedule that waits for a plateau of a round's mean.

    Args:
        schedule: The schedule, or None.
        means: Of the round, by name without "train/".
    """
    if isinstance(schedule, ReduceLROnPlateau) and _monitor(schedule).startswith("train/"):
        _step(schedule, {f"train/{name}": value for name, value in means.items()})


def after_validation(schedule: Any, means: Mapping[str, float], trainer: Trainer) -> None:
    """Step a schedule that waits for a plateau of a validation's mean; a sanity check is none.

    Args:
        schedule: The schedule, or None.
        means: By name without "val", as "/kl" and "_gain/kl".
        trainer: That validates.
    """
    if trainer.sanity_checking:
        return
    if isinstance(schedule, ReduceLROnPlateau) and _monitor(schedule).startswith("val"):
        _step(schedule, {f"val{name}": value for name, value in means.items()})


def _monitor(schedule: ReduceLROnPlateau) -> str:
    """Return the name of the logged value that a schedule waits for.

    Torch's own has no such argument: it takes the reward where it is to grow, else the loss.
    """
    return getattr(schedule, "monitor", "train/reward" if schedule.mode == "max" else "train/loss")


def _step(schedule: ReduceLROnPlateau, logged: Mapping[str, float]) -> None:
    name = _monitor(schedule)
    if name not in logged:
        if name in _SOMETIMES or schedule.last_epoch > 0:
            return  # as in a round that accepted nothing, or whose rewards were equal
        known = ", ".join(sorted(logged)[:8])
        raise UsageError(f"{_MONITOR}: nothing is logged as {name!r}; choose one of {known}, ...")
    if not math.isnan(logged[name]):  # as where no sample of a round could be scored
        schedule.step(logged[name])


def _check_monitor(name: str, trainer: Trainer) -> None:
    """Raise UsageError where a value can never be logged."""
    if not re.match(r"train/|val(_\w+)?/", name):
        raise UsageError(
            f"{_MONITOR}: nothing is logged as {name!r}; names begin with train/ (each round) or "
            "val/ (each validation), as train/reward does"
        )
    if name.startswith("val") and not trainer.limit_val_batches:
        raise UsageError(
            f"{_MONITOR} is {name}, but trainer.limit_val_batches is 0; raise it, or choose a "
            "value of training, such as train/reward"
        )


def _check(optimizer: Optimizer) -> None:
    """Raise UsageError for settings that torch takes although no number comes of them."""
    for name, value in optimizer.defaults.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
            raise UsageError(f"{_KEY}.{name} must be a finite number, got {value}")
