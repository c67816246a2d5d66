"""Callbacks that watch a round from inside, where Lightning has no hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning import Callback
from torch import Tensor

if TYPE_CHECKING:
    from lit_rlft.algorithms.base import Experience, RewardFineTuner

__all__ = ["Observer"]


class Observer(Callback):
    """A callback that `RewardFineTuner` also tells what it collects, computes and is about to do.

    Raising an error in any of these methods stops the run before the weights change again.

    Attributes:
        enabled: Whether it is told anything.
    """

    enabled: bool = True

    def report(self) -> dict[str, Any]:
        """Return what belongs under "cost" in metrics.json, by name."""
        return {}

    def on_phase_start(self, tuner: RewardFineTuner, name: str) -> None:
        """See a part of the work begin: "collect", "update", "sample_tuned", "measure", ..."""

    def on_phase_end(self, tuner: RewardFineTuner, name: str, num_samples: int) -> None:
        """See it end, also by an error.

        Args:
            tuner: Whose work it is.
            name: What it was.
            num_samples: Samples that were drawn in it, where that is what it is for.
        """

    def on_experience(self, tuner: RewardFineTuner, experience: Experience) -> None:
        """See what a round collected, before it is trained on."""

    def on_losses(
        self,
        tuner: RewardFineTuner,
        part: Experience,
        losses: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        """See the losses [n] of some terms, and what is logged of them, before the backward pass.

        Args:
            tuner: Whose loss it is.
            part: The terms, not empty.
            losses: [n], with their graph.
            values: By name, [n].
        """

    def on_gradients(self, tuner: RewardFineTuner, norm: float) -> None:
        """See an update's gradients, summed over processes, before they are clipped and applied.

        Args:
            tuner: Whose parameters have them.
            norm: Over all of them.
        """
