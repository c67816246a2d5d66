"""Processes that call a network together: none may have fewer backward passes than another."""

import io
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lit_rlft.core.randomness import Seeded
from lit_rlft.core.streams import Stream
from lit_rlft.cost.meter import Meter
from lit_rlft.distributed import gather
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.strategy import FSDP2Strategy
from lit_rlft.loop.updates import Layout, Loss

__all__ = ["Idle", "idle_of"]


Idle = Callable[[], Tensor] | None
"""What a process computes while the others have terms left; None where they need not wait."""


def idle_of(
    strategy: Strategy,
    loss: Loss,
    experience: Experience,
    layouts: Sequence[Layout],
    meter: Meter,
) -> Idle:
    """Return a loss without weight, where the processes have parts of the weights.

    Args:
        strategy: The trainer's.
        loss: Of some terms.
        experience: This process's own; without samples it borrows one of another process, and all
            of them must call this.
        layouts: Of the experience of every process.
        meter: Bills nobody for it.
    """
    if not isinstance(strategy, FSDP2Strategy):
        return None
    if all(own.terms for own in layouts) or not any(own.terms for own in layouts):
        spare = experience
    else:
        own = _packed(experience) if len(experience) else None
        everyone = gather(own, len(layouts))
        spare = experience if len(experience) else _unpacked(everyone, strategy.root_device)
    return partial(_weightless, loss, spare, meter)


def _weightless(loss: Loss, experience: Experience, meter: Meter) -> Tensor:
    part = experience.terms(torch.zeros(1, dtype=torch.int64))
    noise = Seeded(part.seeds, Stream.UPDATE, 0)
    with meter.unbilled():
        losses, _ = loss(part, noise)
    return losses.sum() * 0


def _packed(experience: Experience) -> bytes:
    file = io.BytesIO()
    torch.save(experience.index(torch.zeros(1, dtype=torch.int64)), file)
    return file.getvalue()


def _unpacked(everyone: Sequence[bytes | None], device: torch.device) -> Experience:
    found = next(own for own in everyone if own is not None)
    # Safe to unpickle: another process of this run has just made it.
    experience: Experience = torch.load(io.BytesIO(found), device, weights_only=False)
    return experience
