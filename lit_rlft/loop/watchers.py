"""Callbacks that every run has beside its trainer's own."""

from lightning import Callback, Trainer

from lit_rlft.loop.batch_check import BatchCheck
from lit_rlft.loop.callback_check import check_callbacks
from lit_rlft.loop.logged_test import LoggedTest
from lit_rlft.loop.side.rewards import RewardWorkers
from lit_rlft.loop.side.watch import SideWatch
from lit_rlft.loop.whole_draws import whole_draws

__all__ = ["watchers"]


def watchers(trainer: Trainer | None, workers: RewardWorkers | None) -> list[Callback]:
    """Return who watches over batches, tests, the workers of rewards, and weights that are split.

    Args:
        trainer: Of the run, if there is one.
        workers: The setting; None for no workers.

    Raises:
        UsageError: A callback of the trainer cannot do what it is for.
    """
    given = getattr(trainer, "callbacks", [])
    check_callbacks(given)
    beside = [SideWatch()] if workers else []
    found = [BatchCheck(), LoggedTest(), *beside, *whole_draws(trainer)]
    known = {type(callback) for callback in given}  # since an earlier call of this trainer
    return [callback for callback in found if type(callback) not in known]
