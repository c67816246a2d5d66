"""Tells rewards that ask a person where to ask, and the user where to answer."""

from collections.abc import Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.facts import say
from lit_rlft.callbacks.last_checkpoint import LastCheckpoint
from lit_rlft.core.checks import UsageError
from lit_rlft.runs.folder import run_folder
from lit_rlft.voting.human_preference import HumanPreference
from lit_rlft.voting.places import FOLDER

__all__ = ["Voting"]


class Voting(Callback):
    """Opens the folder of votes where a fit's reward asks a person; does nothing elsewhere."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where questions are written and how they are answered.

        Raises:
            UsageError: The algorithm draws no groups of candidates.
        """
        assert isinstance(pl_module, RewardFineTuner)
        asking = list(_asking(pl_module))
        if not asking:
            return
        num_candidates = getattr(pl_module, "num_candidates", None)
        if num_candidates is None:
            raise UsageError(
                f"{pl_module.algorithm} does not draw several candidates of a condition, which "
                "HumanPreference compares; use DDPO, DiffusionDPO, DiffusionNFT, GRAFT or PGRAFT"
            )
        if len(asking) > 1:
            raise UsageError("a reward can have HumanPreference once; take the others out")
        folder = run_folder(trainer)
        asking[0].open(
            folder / FOLDER,
            num_candidates,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            stopping=lambda: _asked_to_end(trainer),
        )
        say(f"votes: this run waits for a person; in another terminal, lit-rlft vote {folder}")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Number the round."""
        assert isinstance(pl_module, RewardFineTuner)
        for reward in _asking(pl_module):
            reward.begin_round(pl_module.num_rounds)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the page that nobody waits any more."""
        assert isinstance(pl_module, RewardFineTuner)
        for reward in _asking(pl_module):
            reward.close()


def _asking(module: RewardFineTuner) -> Iterator[HumanPreference]:
    if module.reward.asks:
        yield from (part for part in module.reward.modules() if isinstance(part, HumanPreference))


def _asked_to_end(trainer: Trainer) -> bool:
    signals = [c.signals for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    return any(own.stop or own.requeue for own in signals)
