"""Stopping at a cost instead of at a number of updates, to compare algorithms."""

from collections.abc import Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import UsageError, at_least

__all__ = ["Budget", "limits"]


class Budget(Callback):
    """Ends the fit with the round in which training has spent a number of calls.

    Args:
        denoiser_calls: Rows the denoiser is evaluated on, over all processes (guidance counts
            both its halves; what checkpointing runs again is not counted).
        reward_calls: Samples that are scored, over all processes.

    Raises:
        UsageError: Neither is given.
    """

    def __init__(self, denoiser_calls: int | None = None, reward_calls: int | None = None) -> None:
        if denoiser_calls is None and reward_calls is None:
            raise UsageError("Budget needs denoiser_calls or reward_calls")
        at_least(1, self, denoiser_calls=denoiser_calls, reward_calls=reward_calls)
        given = {"denoiser_calls": denoiser_calls, "reward_calls": reward_calls}
        self.limits = {name: limit for name, limit in given.items() if limit is not None}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin no round where a resumed run has spent everything."""
        self._stop(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the trainer where a limit is reached."""
        self._stop(trainer, pl_module)

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RewardFineTuner)
        for name, limit in self.limits.items():
            if pl_module.meter.total(name) >= limit:
                trainer.should_stop = True


def limits(trainer: Trainer) -> Iterator[tuple[str, int]]:
    """Iterate over what the budgets of a fit limit: the meter's name, and how much may be spent."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Budget):
            yield from callback.limits.items()
