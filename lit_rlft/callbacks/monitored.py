"""Looks early whether what checkpoints and early stopping monitor is logged at all."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.last_checkpoint import called, monitored
from lit_rlft.core.checks import UsageError

__all__ = ["Monitored"]

_OF_ROUNDS = ("train/", "cost/", "time/")
_OF_VALIDATION = ("val/", "val_")


class Monitored(Callback):
    """Stops a fit with a sentence where a callback monitors a name that is never logged.

    Names of rounds are known after the first round, all others after the first validation, before
    which `LastCheckpoint` saves; Lightning would see it at the first save, with a list of
    everything.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that what validations log can come."""
        assert isinstance(pl_module, RewardFineTuner)
        for name, key in monitored(trainer).items():
            if name.startswith("test/"):
                raise _never(key, name, "a test is no part of a fit; val/ is what fit can monitor")
            if name.startswith(_OF_VALIDATION) and not trainer.enable_validation:
                raise _never(key, name, "this fit has no validation (trainer.limit_val_batches)")
        _warn_of_lowest(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the names of rounds, once there was one: then its end can be saved."""
        if batch_idx:
            _check(trainer, _OF_ROUNDS)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all names, after the first validation within a fit."""
        if not trainer.sanity_checking:
            _check(trainer, ("",))


def _warn_of_lowest(trainer: Trainer, module: RewardFineTuner) -> None:
    """Warn of what waits for the lowest rewards, as Lightning's and torch's own modes do."""
    name = module.reward.name
    rewards = (f"val/{name}", f"val_gain/{name}", "train/reward")
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    for waiting in (*vars(trainer).get("callbacks", []), *schedules):
        monitor, mode = getattr(waiting, "monitor", None), getattr(waiting, "mode", None)
        if monitor in rewards and mode == "min":
            key = called(waiting, trainer)
            rank_zero_warn(
                f"{key}.monitor {monitor} with mode min takes the lowest rewards for the best; set "
                f"{key}.mode to max"
            )


def _check(trainer: Trainer, prefixes: tuple[str, ...]) -> None:
    logged = trainer.callback_metrics
    for name, owner in monitored(trainer).items():
        if name.startswith(prefixes) and name not in logged:
            kind = tuple(p for p in (*_OF_ROUNDS, *_OF_VALIDATION) if name.startswith(p))
            known = sorted(key for key in logged if key.startswith(kind or _OF_VALIDATION))
            raise _never(owner, name, f"there are {', '.join(known)}")


def _never(key: str, name: str, why: str) -> UsageError:
    return UsageError(f"{key} {name} is never logged: {why}")
