"""Callbacks that watch a round from inside, where Lightning has no hooks."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import described
from lit_rlft.distributed import together
from lit_rlft.loop.experience import Experience, check_experience
from lit_rlft.loop.updates import Loss

__all__ = ["Audience", "Hooks"]


class Hooks(Callback):
    """A callback that also sees a round's phases, experience, losses and gradients.

    Raising an error in any of these methods stops the run before the weights change again.

    Attributes:
        enabled: Whether it is called.
    """

    enabled: bool = True

    def report(self) -> dict[str, Any]:
        """Return what belongs under "cost" in metrics.json, by name.

        All processes call it, so that they may gather; what the first one returns is written.
        """
        return {}

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        """See a part of the work begin: "collect", "update", "sample_tuned", "measure", ..."""

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """See it end, also by an error.

        Args:
            module: Whose work it is.
            name: What it was.
            num_samples: Samples that an evaluation drew in it. What a round draws is counted by the
                module's `num_samples`, of all processes.
        """

    def on_experience(self, module: LightningModule, experience: Experience) -> None:
        """See what a round collected, before it is trained on."""

    def on_losses(
        self,
        module: LightningModule,
        part: Experience,
        losses: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        """See the losses [n] of some terms, and what is logged of them, before the backward pass.

        To look at numbers here makes the update wait for the device; `on_gradients` comes after a
        wait and before the weights change.

        Args:
            module: Whose loss it is.
            part: The terms, not empty.
            losses: [n], with their graph.
            values: By name, [n].
        """

    def on_gradients(self, module: LightningModule, norm: float) -> None:
        """See an update's gradients, summed over processes, before they are clipped and applied.

        Args:
            module: Whose parameters have them.
            norm: The norm over all of them.
        """


class Audience:
    """The `Hooks` among a trainer's callbacks, called one after the other.

    Args:
        module: The module that they watch.
        trainer: Has the callbacks; None has none.
    """

    def __init__(self, module: LightningModule, trainer: Trainer | None) -> None:
        self.module, self.trainer = module, trainer

    def __iter__(self) -> Iterator[Hooks]:
        """Iterate over those that are enabled."""
        callbacks = getattr(self.trainer, "callbacks", [])
        return iter([own for own in callbacks if isinstance(own, Hooks) and own.enabled])

    @contextmanager
    def phase(self, name: str, num_samples: int = 0) -> Iterator[None]:
        """Report the block as a phase of the work."""
        started = []
        try:
            for hooks in self:
                hooks.on_phase_start(self.module, name)
                started.append(hooks)
            yield
        finally:
            for hooks in started:
                hooks.on_phase_end(self.module, name, num_samples)

    def on_experience(self, experience: Experience) -> None:
        """Report what a round collected.

        Raises:
            UsageError: Its parts do not fit together.
        """
        check_experience(experience, type(self.module).__name__)
        for hooks in self:
            hooks.on_experience(self.module, experience)

    def watched(self, loss: Loss) -> Loss:
        """Return the loss, made to report its values whenever it is computed.

        It raises UsageError where it returns anything but a loss per sample and a dict.
        """

        def told(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
            losses, values = _losses(loss(part, noise), len(part), type(self.module).__name__)
            for hooks in self:
                hooks.on_losses(self.module, part, losses, values)
            return losses, values

        return told

    def on_gradients(self, norm: float) -> None:
        """Report the norm of an update's gradients.

        Raises:
            UsageError: Another process has failed, which leaves all with gradients that are not
                finite (`accumulate`).
        """
        if self.trainer is None or math.isfinite(norm):
            for hooks in self:
                hooks.on_gradients(self.module, norm)
            return
        with together(self.trainer.world_size):  # a process that has failed says so here
            for hooks in self:
                hooks.on_gradients(self.module, norm)


def _losses(found: Any, num: int, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a loss returned, if it is losses [num] and a dict of values [num].

    A mean over samples would be summed again: gradients would depend on the microbatch size.
    """
    rule = f"it returns a tensor with one loss per sample, shape ({num},), and a dict of values"
    if not isinstance(found, tuple) or len(found) != 2:
        raise UsageError(f"{name}.loss returned {described(found)}; {rule}")
    losses, values = found
    if not isinstance(losses, Tensor) or losses.shape != (num,):
        raise UsageError(f"{name}.loss returned {described(losses)} as losses; {rule}")
    if not isinstance(values, dict):
        raise UsageError(f"{name}.loss returned {described(values)} as values to log; {rule}")
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (num,):
            raise UsageError(
                f"{name}.loss returned {described(value)} as value {key!r} to log; it is a tensor "
                f"with one number per sample, shape ({num},)"
            )
    return losses, values
