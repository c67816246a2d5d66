"""A pool of worker processes that keeps the order of its work."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import TypeVar

from lit_rlft.core.checks import UsageError

__all__ = ["in_workers"]

A = TypeVar("A")
B = TypeVar("B")

_CHUNKS_EACH = 32  # per worker: small enough that none is left with much at the end


def in_workers(function: Callable[[A], B], items: Sequence[A], num_workers: int = 0) -> Iterator[B]:
    """Iterate over `function(item)` in the items' order.

    Args:
        function: A function of a module; each worker imports that module.
        items: What it is called with.
        num_workers: Number of worker processes; 0 calls it here.

    Raises:
        UsageError: The number of workers is negative.
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
    """Return the pool, kept for the next call: a reward is computed every round."""
    # Forked children of a process with threads, as torch's is, may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: killed, it cannot tell it to."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
