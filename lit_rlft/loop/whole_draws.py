"""All weights on every process while samples are drawn, where training splits them."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.sharded import draws_whole, split_again
from lit_rlft.loop.strategy import FSDP2Strategy

__all__ = ["WholeDraws", "whole_draws"]


class WholeDraws(Hooks):
    """Gathers split weights before samples are drawn, and splits them again afterwards."""

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        """Gather them before a round is collected."""
        if name == "collect":
            self._gather(module.trainer)

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """Split them before its updates."""
        if name == "collect":
            self._split(module.trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather them, after callbacks have changed them."""
        self._gather(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Split them, before callbacks change them."""
        self._split(trainer)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _gather(self, trainer: Trainer) -> None:
        for network in _networks(trainer):
            draws_whole(network)

    def _split(self, trainer: Trainer) -> None:
        for network in _networks(trainer):
            split_again(network)


def whole_draws(trainer: Trainer | None) -> list[Callback]:
    """Return the callback that a trainer's strategy needs, if it needs one."""
    return [WholeDraws()] if isinstance(getattr(trainer, "strategy", None), FSDP2Strategy) else []


def _networks(trainer: Trainer) -> list[Any]:
    strategy = trainer.strategy
    return strategy.networks() if isinstance(strategy, FSDP2Strategy) else []
