"""Values of all processes of a run in one place."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlft.core.checks import UsageError

__all__ = [
    "gather",
    "is_known",
    "leave",
    "mean_of_all",
    "of_all",
    "own_part",
    "split_like",
    "telling",
    "to_save",
    "together",
    "whole",
]

T = TypeVar("T")

_KNOWN = "_known_to_the_other_processes"
_LOST = re.compile(r"gloo.*Connection|ncclRemoteError|remote process exited", re.DOTALL)
"""What torch says where a process waits for one that has ended."""


@dataclass(frozen=True)
class _Failure:
    """What a process that has failed hands over in place of its value."""

    sentence: str


class _FailedElsewhere(UsageError):
    """Another process has failed, and all know of it."""


def gather(value: T, world_size: int) -> list[T]:
    """Return the value of every process, in order of rank; all of them must call it.

    Raises:
        UsageError: Another process has left its block of `together` or `telling` by an error.
    """
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise _elsewhere() from error
    for other in values:
        if isinstance(other, _Failure):
            raise _FailedElsewhere(other.sentence)
    return values


def mean_of_all(values: Tensor, world_size: int) -> float:
    """Return the mean over the values of all processes; NaN where there are none."""
    if world_size == 1:
        return float(values.mean())
    sums = gather((float(values.double().sum()), values.numel()), world_size)
    number = sum(own for _, own in sums)
    return sum(own for own, _ in sums) / number if number else float("nan")


def leave(error: Exception) -> None:
    """Leave the other processes in the midst of what they compute together: they fail, too.

    Args:
        error: Why; `telling` does not try to tell the others of it.
    """
    vars(error)[_KNOWN] = True
    torch.distributed.destroy_process_group()


def is_known(error: Exception) -> bool:
    """Return whether the other processes know of an error, so that they need not be told."""
    return _KNOWN in vars(error) or isinstance(error, _FailedElsewhere) or _is_lost(error)


def _is_lost(error: Exception) -> bool:
    """Return whether an error says that another process has ended."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _elsewhere() -> _FailedElsewhere:
    return _FailedElsewhere("another process failed and has ended; its own message says why")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece; where it is split among processes, all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which may be all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that all processes have, split among them where `like` is."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    mesh, full = like.device_mesh, tensor.contiguous()
    # FSDP2 splits along the first dimension; the last processes may have nothing.
    parts, rank = full.chunk(mesh.size()), mesh.get_local_rank()
    own = (parts[rank] if rank < len(parts) else full[:0]).to(like.device, copy=True)
    return DTensor.from_local(
        own, mesh, like.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def of_all(finite: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """Return which flags are set on all processes, where any of the weights is split among them."""
    if not any(isinstance(weight, DTensor) for weight in weights):
        return finite
    flags = finite.int()
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
    return flags.bool()


def to_save(tensor: Tensor) -> Tensor:
    """Return a tensor as the first process writes it, which is the only one to do so.

    One that is split among processes, all of which must call this, is whole on the first one's CPU
    and without numbers elsewhere.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor().to("meta" if torch.distributed.get_rank() else "cpu")


@contextmanager
def telling(world_size: int) -> Iterator[None]:
    """Tell the other processes of an error of the block, at what they gather next.

    The blocks of processes need not end at the same time, nor be equally many. Within another block
    an error is told once.

    Raises:
        UsageError: Another process has ended, on which this one waited in its block.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it
        if world_size > 1 and _is_lost(error):
            raise _elsewhere() from error
        if not is_known(error):
            vars(error)[_KNOWN] = True
            with suppress(_FailedElsewhere):
                gather(_Failure(_sentence(error)), world_size)
        raise


@contextmanager
def together(world_size: int) -> Iterator[None]:
    """Leave the block when all processes do, so that none waits for one that has failed.

    Within the block too: what is next gathered there tells the others.

    Raises:
        UsageError: Another process's block raised an error; this one's went well.
    """
    with telling(world_size):
        yield
        gather(None, world_size)


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        return str(error)
    return f"another process failed ({type(error).__name__}: {error})"
