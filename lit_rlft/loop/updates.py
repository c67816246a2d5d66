"""Minibatch updates by hand: the same gradients for any microbatch and number of processes."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.streams import Stream
from lit_rlft.loop.experience import Experience

__all__ = [
    "Loss",
    "Shares",
    "Update",
    "accumulate",
    "gradient_norm",
    "is_maximum",
    "no_sync",
    "plan",
]

Loss = Callable[[Experience, Generators], tuple[Tensor, dict[str, Tensor]]]
"""From some terms and their noise to losses [n] and values [n] to log."""


def is_maximum(name: str) -> bool:
    """Return whether values of this name, which are not negative, are reduced by their maximum."""
    return name.endswith("_max")


@dataclass(frozen=True)
class Update:
    """A minibatch, the pass it belongs to, and its size summed over all processes."""

    minibatch: Experience
    epoch: int
    total: int


def plan(
    experience: Experience,
    counts: Sequence[int],
    num_epochs: int,
    minibatch_size: int,
    seed: int,
    round_index: int,
) -> list[Update]:
    """Split a round's experience into minibatches, `num_epochs` times, in an order from the seed.

    Every process makes the same number of updates for any share of the experience, and
    knows the share of the others, so that gradients are those of the whole minibatch.

    Args:
        experience: This process's own.
        counts: Number of samples of every process.
        num_epochs: Passes over the experience.
        minibatch_size: Samples per update on each process, at most.
        seed: Of the run.
        round_index: Number of the round.
    """
    num_updates = math.ceil(max(counts) / minibatch_size)
    if not num_updates:
        return []
    updates = []
    for epoch in range(num_epochs):
        key = seed_from(seed, Stream.ORDER, round_index, epoch)
        order = torch.randperm(len(experience), generator=generators([key])[0])
        for i, rows in enumerate(order.tensor_split(num_updates)):
            total = sum(n // num_updates + (i < n % num_updates) for n in counts)
            updates.append(Update(experience.index(rows), epoch, total))
    return updates


class Shares(NamedTuple):
    """How an update is split into microbatches and among processes.

    Attributes:
        microbatch_size: Terms per backward pass; None takes all.
        world_size: Number of processes, over which gradients are averaged.
        no_sync: Makes a context in which a backward pass does not wait for other processes.
    """

    microbatch_size: int | None = None
    world_size: int = 1
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext


def accumulate(
    update: Update,
    loss: Loss,
    backward: Callable[[Tensor], object],
    parameters: Sequence[nn.Parameter],
    shares: Shares,
) -> dict[str, float]:
    """Accumulate an update's gradients; return what to log, averaged over its samples.

    Args:
        update: The minibatch.
        loss: Returns the losses of some of its terms.
        backward: Called with each microbatch's share of the loss.
        parameters: What is trained; a process without samples takes part with zeros.
        shares: How the update is split.
    """
    minibatch = update.minibatch
    scale = shares.world_size / update.total
    num_terms = max(minibatch.num_terms, 1)
    size = shares.microbatch_size or num_terms
    starts = range(0, num_terms, size)
    logged: dict[str, float] = defaultdict(float)
    for start in starts:
        rows = torch.arange(start, min(start + size, minibatch.num_terms))
        total, values = _summed(minibatch.terms(rows), update.epoch, loss, parameters)
        # One all-reduce per update: only the last backward pass synchronises.
        with nullcontext() if start == starts[-1] else shares.no_sync():
            backward(total * scale)
        for name, value in values.items():
            if is_maximum(name):
                logged[name] = max(logged[name], float(value.max()))
            else:
                logged[name] += float(value.sum()) * scale
    return dict(logged)


def _summed(
    part: Experience, epoch: int, loss: Loss, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, dict[str, Tensor]]:
    if not len(part):
        # Other processes have samples: take part in their all-reduce with zeros.
        return torch.stack([p.sum() * 0 for p in parameters]).sum(), {}
    noise = generators([seed_from(seed, Stream.UPDATE, epoch) for seed in part.seeds])
    losses, values = loss(part, noise)
    return losses.sum(), {"loss": losses.detach(), **values}


def gradient_norm(
    parameters: Iterable[nn.Parameter], optimizer: LightningOptimizer, precision: object
) -> float:
    """Return the norm of all gradients, in units of the loss.

    Args:
        parameters: The trained parameters.
        optimizer: Their optimiser.
        precision: The trainer's plugin, which may have scaled them.
    """
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        # fp16 gradients are scaled until the scaler is told to undo it.
        precision.scaler.unscale_(optimizer.optimizer)
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def no_sync(strategy: object) -> AbstractContextManager[Any]:
    """Return a context in which backward passes leave gradients on their process."""
    if isinstance(strategy, DDPStrategy):
        return strategy.block_backward_sync()
    return nullcontext()
