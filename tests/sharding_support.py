"""FSDP2 on forks of the test's own process, which need no second import of everything."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lit_rlft.loop.strategy import FSDP2Strategy

__all__ = ["FORKED", "ForkedFSDP2"]

FORKED = "fsdp2_fork"
"""Its name for the trainer, which takes any precision for a name, and not for a class."""


class _Forks(_MultiProcessingLauncher):
    """Does not bring weights back, of which the first process has a part alone."""

    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> Any:
        module = trainer.lightning_module
        module.state_dict = dict  # type: ignore[method-assign]
        return super()._collect_rank_zero_results(trainer, results)


class ForkedFSDP2(FSDP2Strategy):
    """FSDP2 whose processes are forks."""

    def _configure_launcher(self) -> None:
        self._launcher = _Forks(self, start_method="fork")


StrategyRegistry.register(FORKED, ForkedFSDP2, description="for tests")
