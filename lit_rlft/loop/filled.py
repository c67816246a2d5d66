"""Microbatches of one size, for a compiled network: each size of a batch costs a graph."""

import torch
from torch import Tensor

from lit_rlft.core.batch_size import BatchSize
from lit_rlft.core.randomness import Generators, generators
from lit_rlft.cost.meter import Meter
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.updates import Loss, Update

__all__ = ["filled"]


def filled(loss: Loss, microbatch: BatchSize, update: Update, meter: Meter) -> Loss:
    """Return a loss that fills small microbatches up with their first row.

    The losses of rows that fill up are left out, so that they have no gradient, and nobody is
    billed for them: how many there are depends on the number of processes.

    Args:
        loss: Of any number of terms, each of which has a loss of its own.
        microbatch: Terms per backward pass.
        update: Knows how many terms the largest minibatch has.
        meter: Counts the cost.
    """

    def of_whole(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        num, most = len(part), update.largest
        missing = min(microbatch.rows or most, most) - num
        if missing <= 0:
            return loss(part, noise)
        rows = torch.cat([torch.arange(num), torch.zeros(missing, dtype=torch.int64)])
        more = None if noise is None else [*noise, *generators([0] * missing)]
        with meter.billing(num, len(rows)):
            losses, values = loss(part.index(rows), more)
        return losses[:num], {name: value[:num] for name, value in values.items()}

    return of_whole
