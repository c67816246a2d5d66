"""Minibatch updates by hand: the same gradients for any microbatch and number of processes."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather

if TYPE_CHECKING:
    from lit_rlft.algorithms.base import Experience, RewardFineTuner

__all__ = ["Update", "Updates", "is_maximum"]


def is_maximum(name: str) -> bool:
    """Return whether values of this name, which are not negative, are reduced by their maximum."""
    return name.endswith("_max")


@dataclass(frozen=True)
class Update:
    """A minibatch, the pass it belongs to, and its size summed over all processes."""

    minibatch: Experience
    epoch: int
    total: int


class Updates:
    """Plans and takes the optimiser steps of a round.

    Args:
        tuner: Whose loss is minimised; its settings say how.
    """

    def __init__(self, tuner: RewardFineTuner) -> None:
        self.tuner = tuner

    def plan(self, experience: Experience) -> list[Update]:
        """Split the experience into minibatches, `num_epochs` times, in an order from the seed.

        Every process makes the same number of updates, whatever its share of the experience, and
        knows the share of the others, so that gradients are those of the whole minibatch.
        """
        tuner = self.tuner
        counts = gather(len(experience), tuner.trainer.world_size)
        num_updates = math.ceil(max(counts) / tuner.minibatch_size)
        if not num_updates:
            return []
        updates = []
        for epoch in range(tuner.num_epochs):
            key = seed_from(tuner.seed, Stream.ORDER, tuner.num_rounds, epoch)
            order = torch.randperm(len(experience), generator=generators([key])[0])
            for i, rows in enumerate(order.tensor_split(num_updates)):
                total = sum(n // num_updates + (i < n % num_updates) for n in counts)
                updates.append(Update(experience.index(rows), epoch, total))
        return updates

    def take(self, update: Update) -> dict[str, float]:
        """Take one optimiser step; return what to log: the losses' means and the gradient norm."""
        tuner, minibatch = self.tuner, update.minibatch
        optimizer = tuner.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        scale = tuner.trainer.world_size / update.total
        num_terms = max(minibatch.num_terms, 1)
        size = tuner.microbatch_size or num_terms
        starts = range(0, num_terms, size)
        logged: dict[str, float] = defaultdict(float)
        for start in starts:
            rows = torch.arange(start, min(start + size, minibatch.num_terms))
            loss, values = self._summed_loss(minibatch.terms(rows), update.epoch)
            # One all-reduce per update: only the last backward pass synchronises.
            with nullcontext() if start == starts[-1] else self._no_sync():
                tuner.manual_backward(loss * scale)
            for name, value in values.items():
                if is_maximum(name):
                    logged[name] = max(logged[name], float(value.max()))
                else:
                    logged[name] += float(value.sum()) * scale
        logged["grad_norm"] = self._clip(optimizer)
        optimizer.step()
        tuner.num_updates += 1
        scheduler = tuner.lr_schedulers()
        if isinstance(scheduler, LRScheduler):
            scheduler.step()
        return dict(logged)

    def _summed_loss(self, part: Experience, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not len(part):
            # Other processes have samples: take part in their all-reduce with zeros.
            parameters = self.tuner.trainable().parameters()
            return torch.stack([p.sum() * 0 for p in parameters if p.requires_grad]).sum(), {}
        noise = generators([seed_from(seed, Stream.UPDATE, epoch) for seed in part.seeds])
        losses, values = self.tuner.loss(part, noise)
        for observer in self.tuner.observers:
            observer.on_losses(self.tuner, part, losses, values)
        return losses.sum(), {"loss": losses.detach(), **values}

    def _clip(self, optimizer: LightningOptimizer) -> float:
        tuner, precision = self.tuner, self.tuner.trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            # fp16 gradients are scaled until the scaler is told to undo it.
            precision.scaler.unscale_(optimizer.optimizer)
        grads = [p.grad for p in tuner.trainable().parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        for observer in tuner.observers:
            observer.on_gradients(tuner, norm)
        if tuner.max_grad_norm is not None:
            tuner.clip_gradients(optimizer.optimizer, tuner.max_grad_norm, "norm")
        return norm

    def _no_sync(self) -> AbstractContextManager[None]:
        strategy = self.tuner.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            return strategy.block_backward_sync()
        return nullcontext()
