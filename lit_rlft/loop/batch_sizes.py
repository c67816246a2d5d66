"""The batch sizes of a run: what `auto` has come to, agreed on by all processes and kept."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_rlft.core.batch_size import AUTO, BatchSize, GlobalNoise, free_memory
from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.cost.meter import Meter
from lit_rlft.distributed import gather
from lit_rlft.kit.compiled import is_compiled
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.filled import filled
from lit_rlft.loop.updates import Loss, Passes, Update, accumulate, meet, stopping
from lit_rlft.runs.files import write_whole
from lit_rlft.runs.folder import run_folder, writes_nothing

__all__ = ["BatchSizes", "Followed", "Sized", "finishing", "fitting", "rehearse"]

_SAMPLES = 64
"""Samples that are drawn at a time unless memory runs out."""
_FILE = "batch_sizes.json"


class BatchSizes:
    """The batch sizes of a tuner and of its pipeline.

    Args:
        microbatch: `model.microbatch_size`.
        sampling: `model.sampling_batch_size`.
        pipeline: The pipeline's own, by key.

    Attributes:
        microbatch: Terms per backward pass.
        sampling: Samples drawn at a time.
    """

    def __init__(
        self,
        microbatch: int | Literal["auto"] | None,
        sampling: int | Literal["auto"],
        pipeline: Mapping[str, BatchSize],
    ) -> None:
        self.microbatch = BatchSize("model.microbatch_size", microbatch, say=rank_zero_info)
        key = "model.sampling_batch_size"
        self.sampling = BatchSize(key, sampling, _SAMPLES, rank_zero_info)
        self._pipeline = dict(pipeline)
        self._told = {key: size.rows for key, size in pipeline.items() if size.automatic}

    @property
    def automatic(self) -> dict[str, BatchSize]:
        """Those that may change, by key."""
        own = {size.key: size for size in (self.microbatch, self.sampling)}
        return {key: size for key, size in (own | self._pipeline).items() if size.automatic}

    def filled(self, loss: Loss, network: nn.Module, update: Update, meter: Meter) -> Loss:
        """Return the loss of an update, in microbatches of one size where a network is compiled."""
        return filled(loss, self.microbatch, update, meter) if is_compiled(network) else loss

    def taken(self, num_terms: int) -> dict[str, int]:
        """Return the rows that an update took at a time, by key; first what is best lowered."""
        automatic = self.automatic
        found = {key: automatic[key].most for key in self._pipeline if key in automatic}
        if self.microbatch.automatic:
            found[self.microbatch.key] = min(self.microbatch.rows or num_terms, num_terms)
        return found

    def state(self) -> dict[str, int | None]:
        """Return what they have come to, for a checkpoint."""
        return {key: size.rows for key, size in self.automatic.items()}

    def load(self, state: Mapping[str, int | None]) -> None:
        """Go on with those of a checkpoint; numbers that are given stay."""
        for key, size in self.automatic.items():
            if key in state:
                size.go_on(state[key])

    def check(self, trainer: Trainer) -> None:
        """Raise UsageError where a strategy does not let processes start an update again."""
        alone = trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)
        if self.microbatch.automatic and not alone:
            raise UsageError(
                "model.init_args.microbatch_size is auto, which works on one device and with the "
                f"strategy ddp, not with {type(trainer.strategy).__name__}; set it to a number"
            )

    def agree(self, world_size: int) -> None:
        """Take the smallest of all processes; all of them must call this."""
        sizes = self.automatic
        if not sizes or world_size == 1:
            return
        everyone = gather(self.state(), world_size)
        for key, size in sizes.items():
            known = [rows for state in everyone if (rows := state[key]) is not None]
            size.go_on(min(known, default=None))

    def settle(self, trainer: Trainer) -> None:
        """Agree, and note in the log and in the run's folder what is new; all must call this."""
        self.agree(trainer.world_size)
        state = self.state()
        if state == self._told:
            return
        self._told = state
        listed = ", ".join(f"{key} {'all' if n is None else n}" for key, n in state.items())
        known = trainer.strategy.root_device.type == "cuda"
        plain = "" if known else "; only GPUs tell what fits, so these are plain defaults"
        rank_zero_info(f"batch sizes (auto): {listed}{plain}")
        if trainer.is_global_zero and not writes_nothing(trainer):
            path = Path(run_folder(trainer)) / _FILE
            write_whole(path, json.dumps(state, indent=2) + "\n")


class Followed:
    """A setting that its batch size follows: one that is set later counts from then on.

    Args:
        size: Name of the batch size in `sizes`.
    """

    def __init__(self, size: str) -> None:
        self.size = size

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, holder: None, owner: type) -> "Followed": ...

    @overload
    def __get__(self, holder: object, owner: type) -> Any: ...

    def __get__(self, holder: object, owner: type) -> Any:
        if holder is None:
            return self
        if self.name not in vars(holder):
            raise AttributeError(f"{owner.__name__} has no {self.name} yet")
        return vars(holder)[self.name]

    def __set__(self, holder: Any, given: int | Literal["auto"] | None) -> None:
        if "sizes" in vars(holder):
            one_of(holder, self.name, (AUTO,), given, others="a whole number")
            at_least(1, holder, **{self.name: given})
            getattr(holder.sizes, self.size).give(given)
        vars(holder)[self.name] = given


class Sized:
    """The settings of a tuner that are batch sizes.

    Attributes:
        sizes: The batch sizes themselves.
    """

    sizes: BatchSizes
    microbatch_size = Followed("microbatch")
    sampling_batch_size = Followed("sampling")


def fitting(
    update: Update, loss: Loss, passes: Passes, sizes: BatchSizes, meter: Meter
) -> dict[str, Tensor]:
    """Accumulate an update's gradients, from the start with fewer terms where memory runs out.

    Nothing is left of an attempt that failed: no gradient, no cost, no random number. So the
    gradients are those of a run with the smaller number. Of several processes all try again.

    Args:
        update: As `accumulate` takes it.
        loss: Returns the losses of some terms.
        passes: How the update is split; its number of terms is not used, and gradients are zero.
        sizes: The batch sizes.
        meter: Counts the cost.

    Raises:
        torch.OutOfMemoryError: There is no room for one term.
        UsageError: There is none on another process.
    """
    several = passes.world_size > 1
    if not sizes.automatic or (several and not sizes.microbatch.automatic):
        return accumulate(update, loss, passes._replace(microbatch_size=sizes.microbatch.rows))
    noise, counted = GlobalNoise(), replace(meter.current)
    while True:
        part = passes._replace(microbatch_size=sizes.microbatch.rows, held=several)
        for changing in sizes.automatic.values():
            changing.most = 0
        logged, failed = _attempt(update, loss, part)
        if not _again(failed, update.minibatch.num_terms, sizes, passes.world_size):
            break
        for parameter in passes.parameters:
            parameter.grad = None
        free_memory()
        noise.restore()
        vars(meter.current).update(vars(counted))
    if several:
        meet(passes)
    return logged


@contextmanager
def finishing(update: Update, passes: Passes, sizes: BatchSizes) -> Iterator[None]:
    """In the block an update's gradients are used; an error there stops the other processes, too.

    What they do next is the next update. After the last one of a round they gather, and hear of it
    there (`lit_rlft.distributed.telling`), unless they have parts of the weights.

    Args:
        update: As `fitting` takes it.
        passes: How updates are split.
        sizes: The batch sizes; with automatic ones processes gather in the next update, too.
    """
    if update.last and passes.idle is None:
        yield
    else:
        with stopping(passes._replace(held=sizes.microbatch.automatic)):
            yield


def _attempt(update: Update, loss: Loss, passes: Passes) -> tuple[dict[str, Tensor], str | None]:
    """Return what `accumulate` does, and what was said where memory ran out.

    With the error gone, so are the tensors of its traceback.
    """
    try:
        return accumulate(update, loss, passes), None
    except torch.OutOfMemoryError as error:
        return {}, str(error)


def rehearse(
    minibatch: Experience, loss: Loss, passes: Passes, sizes: BatchSizes, meter: Meter
) -> None:
    """Find how many terms fit, before any update; nothing else is left of it.

    It is for algorithms that need the number before they update. All processes must call this.

    Args:
        minibatch: This process's own, possibly empty.
        loss: As `fitting` takes it.
        passes: How the update is split; there are no gradients.
        sizes: The batch sizes; nothing happens where the number is given or known already.
        meter: Counts nothing.
    """
    if not sizes.microbatch.automatic or sizes.microbatch.begun:
        return
    terms = gather(minibatch.num_terms, passes.world_size)
    sizes.microbatch.begin(max(*terms, 1))
    noise, update = GlobalNoise(), Update(minibatch, 0, max(len(minibatch), 1), max(sum(terms), 1))
    with torch.enable_grad(), meter.unbilled():
        fitting(update, loss, passes, sizes, meter)
    for parameter in passes.parameters:
        parameter.grad = None
    noise.restore()


def _again(failed: str | None, num_terms: int, sizes: BatchSizes, world_size: int) -> bool:
    """Return whether an update is tried again, with fewer rows; the same on all processes."""
    own = None if failed is None else sizes.taken(num_terms)
    votes = [vote for vote in gather(own, world_size) if vote is not None]
    if not votes:
        return False
    automatic = sizes.automatic
    if any(automatic[key].fewer(min(vote[key] for vote in votes)) for key in votes[0]):
        return True
    if failed is not None:
        raise torch.OutOfMemoryError(failed)
    gather(None, world_size)  # the process that has failed says so here
    raise AssertionError("no process has failed")
