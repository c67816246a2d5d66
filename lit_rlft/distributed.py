"""Values of all processes of a run in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from lit_rlft.core.checks import UsageError

__all__ = ["gather", "together"]

T = TypeVar("T")


def gather(value: T, world_size: int) -> list[T]:
    """Return the value of every process, in order of rank; all of them must call it."""
    if world_size == 1:
        return [value]
    values = [value] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def together(world_size: int) -> Iterator[None]:
    """Leave the block when all processes do, so that none waits for one that has failed.

    Raises:
        UsageError: Another process's block raised an error; this one's went well.
    """
    raised = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it
        raised = error
    problem = "" if raised is None else _sentence(raised)
    problems = list(filter(None, gather(problem, world_size)))
    if raised is not None:
        raise raised
    if problems:
        raise UsageError(problems[0])


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        return str(error)
    return f"another process failed ({type(error).__name__}: {error})"
