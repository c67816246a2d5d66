"""Work shared out among processes, in order."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import TypeVar

from lit_rlft.core.checks import UsageError

__all__ = ["in_processes"]

A = TypeVar("A")
B = TypeVar("B")

_CHUNKS_EACH = 32  # per process: small enough that none is left with much at the end


def in_processes(
    function: Callable[[A], B], items: Sequence[A], num_workers: int = 0
) -> Iterator[B]:
    """Iterate over `function(item)` in the items' order.

    Args:
        function: A function of a module, which is imported in each process.
        items: What it is called with.
        num_workers: Number of processes; 0 calls it here.

    Raises:
        UsageError: The number of processes is negative.
    """
    if num_workers < 0:
        raise UsageError(f"num_workers must be 0 or more, got {num_workers}")
    if num_workers == 0 or len(items) < 2:
        yield from map(function, items)
        return
    size = max(1, len(items) // (_CHUNKS_EACH * num_workers))
    yield from _pool(num_workers).map(function, items, chunksize=size)


@lru_cache(maxsize=1)
def _pool(num_workers: int) -> ProcessPoolExecutor:
    """Return processes, kept for the next call: a reward comes back every round."""
    # Forked children of a process with threads, as torch's is, may hang.
    return ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
