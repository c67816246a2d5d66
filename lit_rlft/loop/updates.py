"""Minibatch updates by hand: the same gradients for any microbatch and number of processes."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import Generators, Seeded, generators, seed_from
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import is_known, leave, whole
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.tally import Tally, is_maximum

__all__ = [
    "Layout",
    "Loss",
    "Passes",
    "Update",
    "accumulate",
    "clip",
    "layout",
    "meet",
    "plan",
    "settled",
    "stopping",
]

Loss = Callable[[Experience, Generators], tuple[Tensor, dict[str, Tensor]]]
"""From some terms and their noise to losses [n] and values [n] to log."""


@dataclass(frozen=True)
class Update:
    """A minibatch, of which this process has its own samples, and the pass it belongs to.

    Attributes:
        minibatch: The samples of this process, possibly none.
        epoch: Number of the pass.
        total: Number of samples of all processes.
        total_terms: Number of terms of the loss of all processes.
        most_terms: Number of terms of the process that has the most.
        largest: Number of terms that this process has in the largest minibatch of its round.
        last: Whether no other update follows in its round.
    """

    minibatch: Experience
    epoch: int
    total: int
    total_terms: int
    most_terms: int = 0
    largest: int = 0
    last: bool = True


class Layout(NamedTuple):
    """What a process tells the others of its experience, a few integers.

    Attributes:
        counts: Number of samples of each row of its batch.
        terms: Number of terms of each sample.
    """

    counts: list[int]
    terms: list[int]


def layout(experience: Experience, num_rows: int, world_size: int = 1) -> Layout:
    """Return what the other processes have to know of an experience.

    Args:
        experience: This process's own.
        num_rows: Rows of its batch.
        world_size: Number of processes.

    Raises:
        UsageError: Its rows have unequal numbers of samples, and it does not say how many.
    """
    counts, num = experience.counts, len(experience)
    if counts is None:
        counts = [num // max(num_rows, 1)] * num_rows
    if sum(counts) != num:
        if world_size > 1:
            raise UsageError(
                f"a round collected {num} samples for {num_rows} conditions without saying in "
                "Experience.counts how many each has, which several processes have to know; let "
                "collect set it, or set trainer.devices to 1"
            )
        counts = [num]
    return Layout(list(counts), experience.terms_per_sample.tolist())


def plan(
    experience: Experience,
    layouts: Sequence[Layout],
    rank: int,
    num_epochs: int,
    minibatch_size: int,
    seed: int,
    round_index: int,
) -> list[Update]:
    """Split a round's experience into minibatches, `num_epochs` times, in an order from the seed.

    The samples of all processes are split, in the order that one process would have: which of them
    meet in a minibatch does not depend on the number of processes. They stay where they are, so a
    process may have many samples of a minibatch, or none. A minibatch without a term is left out:
    an optimiser's momentum and weight decay would move the weights, where nothing is learnt.

    Args:
        experience: This process's own.
        layouts: Of the experience of every process, in order of rank.
        rank: This process.
        num_epochs: Passes over the experience.
        minibatch_size: Samples per update over all processes, at most.
        seed: Of the run.
        round_index: Number of the round.
    """
    owners, own_rows = _places(layouts)
    terms = torch.tensor([layouts[r].terms[i] for r, i in zip(owners, own_rows, strict=True)])
    mine, rows = torch.tensor(owners) == rank, torch.tensor(own_rows)
    num_updates = math.ceil(len(owners) / minibatch_size)
    updates = []
    for epoch in range(num_epochs if num_updates else 0):
        key = seed_from(seed, Stream.ORDER, round_index, epoch)
        order = torch.randperm(len(owners), generator=generators([key])[0])
        for places in order.tensor_split(num_updates):
            own = experience.index(rows[places[mine[places]]])
            shares = torch.bincount(torch.tensor(owners)[places], terms[places])
            total = int(terms[places].sum())
            updates.append(Update(own, epoch, len(places), total, int(shares.max())))
    largest = max((one.minibatch.num_terms for one in updates), default=0)
    kept = [one for one in updates if one.total_terms]
    return [replace(one, largest=largest, last=one is kept[-1]) for one in kept]


def _places(layouts: Sequence[Layout]) -> tuple[list[int], list[int]]:
    """Return the process of every sample and its row there, in the order of one process.

    Row j of the batch of rank r of R is row r + R j of the whole batch, as loaders share it out.
    """
    ends = [list(itertools.accumulate(own.counts, initial=0)) for own in layouts]
    owners: list[int] = []
    rows: list[int] = []
    for j in range(max(map(len, ends), default=1) - 1):
        for rank, own in enumerate(ends):
            if j + 1 < len(own):
                rows += range(own[j], own[j + 1])
                owners += [rank] * (own[j + 1] - own[j])
    return owners, rows


class Passes(NamedTuple):
    """The backward passes of an update: of what, by how many terms, and with which processes.

    Attributes:
        backward: Called with each microbatch's share of the loss.
        parameters: What is trained; a process without samples takes part with zeros.
        microbatch_size: Terms per backward pass; None takes all.
        world_size: Number of processes, over which gradients are averaged.
        no_sync: Makes a context in which a backward pass does not wait for other processes.
        held: Whether no backward pass waits; the processes `meet` afterwards.
        idle: Computes a loss without weight. Given, every process makes as many passes as the one
            that has the most terms, for all of them have parts of the weights.
        add_up: Adds a tensor up over processes, in place. Given, a backward pass that waits has
            gradients for all weights, and weights that no loss reaches are left without one.
    """

    backward: Callable[[Tensor], object]
    parameters: Sequence[nn.Parameter]
    microbatch_size: int | None = None
    world_size: int = 1
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    held: bool = False
    idle: Callable[[], Tensor] | None = None
    add_up: Callable[[Tensor], object] | None = None


def accumulate(update: Update, loss: Loss, passes: Passes) -> dict[str, Tensor]:
    """Accumulate an update's gradients; return what to log, averaged over its terms.

    Nothing here waits for the device.

    Args:
        update: The minibatch.
        loss: Returns the losses of some of its terms.
        passes: How it is split.

    Raises:
        Exception: `loss` or a backward pass failed. The gradients of the other processes are then
            NaN, or the others fail, too.
    """
    minibatch = update.minibatch
    scale = passes.world_size / update.total
    # Values are means over terms, of which a sample may have several.
    share = update.total / max(update.total_terms, 1)
    num_terms = max(update.most_terms if passes.idle else minibatch.num_terms, 1)
    size = passes.microbatch_size or num_terms
    starts = range(0, num_terms, size)
    # Other processes have samples: take part in their all-reduce with zeros.
    idle = passes.idle or partial(_nothing, passes)
    tally = Tally()
    for start in starts:
        rows = torch.arange(start, max(start, min(start + size, minibatch.num_terms)))
        # One all-reduce per update: only the last backward pass synchronises.
        last = start == starts[-1] and not passes.held
        with stopping(passes):
            total, values = _summed(minibatch.terms(rows), update.epoch, loss, idle)
            if last:
                _averaged(total * scale, passes)
            elif total.requires_grad:
                with passes.no_sync():
                    passes.backward(total * scale)
        tally.add(values)
    return _means(tally.totals(), scale, share)


@contextmanager
def stopping(passes: Passes) -> Iterator[None]:
    """Let no other process wait in its next all-reduce for one whose block raises an error.

    Nothing is done where no backward pass waits.
    """
    try:
        yield
    except Exception as error:
        if passes.world_size > 1 and not is_known(error):
            if passes.idle:  # the others wait in the midst of a network
                leave(error)
            elif not passes.held:
                _spoil(error, passes)
        raise


def _spoil(error: Exception, passes: Passes) -> None:
    """Make the gradients of all processes NaN, at which they ask what has happened."""
    try:
        _averaged(_zeros(passes.parameters) * math.nan, passes)
    except Exception:  # some gradients are with the others already
        leave(error)


def _means(totals: Mapping[str, Tensor], scale: float, share: float) -> dict[str, Tensor]:
    """Return maxima as they are, and sums as means over all terms, or of the loss over samples."""
    weights = {name: scale * (1.0 if name == "loss" else share) for name in totals}
    return {n: own if is_maximum(n) else own * weights[n] for n, own in totals.items()}


def meet(passes: Passes) -> None:
    """Average the gradients that processes have held back."""
    _averaged(_nothing(passes), passes)


def _averaged(total: Tensor, passes: Passes) -> None:
    """Make the backward pass that waits for the other processes.

    They wait for a gradient of each parameter, whether the loss reaches it or not. An optimiser
    would move one with a gradient of zero (momentum, weight decay), and skips one without.
    """
    parameters = passes.parameters
    if passes.add_up is None:
        passes.backward(total)
        return
    reached = [int(p.grad is not None) for p in parameters]

    def note(index: int, parameter: Tensor) -> None:
        reached[index] = int(parameter.grad is not None)

    hooks = [
        p.register_post_accumulate_grad_hook(partial(note, i))  # type: ignore[no-untyped-call]
        for i, p in enumerate(parameters)
    ]
    try:
        passes.backward(_Through.apply(total, *parameters))  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    of_any = torch.tensor(reached, device=parameters[0].device)
    passes.add_up(of_any)
    if not all(reached):
        for parameter, known in zip(parameters, of_any.tolist(), strict=True):
            if not known:
                parameter.grad = None


class _Through(torch.autograd.Function):
    """Passes a loss on; its backward pass comes to all parameters, without a gradient for them."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num = len(parameters)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, *[None] * ctx.num)


def _summed(
    part: Experience, epoch: int, loss: Loss, idle: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if not len(part):
        return idle(), {}
    losses, values = loss(part, Seeded(part.seeds, Stream.UPDATE, epoch))
    return losses.sum(), {"loss": losses.detach(), **values}


def _nothing(passes: Passes) -> Tensor:
    """Return the loss of no samples."""
    zeros = _zeros(passes.parameters)
    return zeros if passes.add_up is None else zeros.detach()


def _zeros(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.stack([p.sum() * 0 for p in parameters]).sum()


def settled(
    logged: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    scale: float = 1.0,
) -> tuple[dict[str, float], Tensor]:
    """Return the numbers that an update logs, and the norm of all gradients, "grad_norm" there.

    A norm that is too large for float16 is no number: such an update is skipped (`stepped`).

    Waits for the device once, for all of them together.

    Args:
        logged: What `accumulate` returned.
        parameters: The trained parameters.
        scale: Of their gradients (`loss_scale`).
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads)) / scale
    values = {**logged, "grad_norm": norm}
    numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
    found = dict(zip(values, numbers, strict=True))
    if scale != 1 and not math.isfinite(found["grad_norm"]):
        del found["grad_norm"]
    return found, norm


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float | None) -> None:
    """Scale gradients down to a norm.

    Args:
        parameters: The trained parameters.
        norm: Of all their gradients, without the scale that losses have.
        max_norm: The largest that is left alone; None leaves all alone.
    """
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
