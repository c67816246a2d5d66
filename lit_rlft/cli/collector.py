"""Python's search for reference cycles, off while a command starts.

Start-up makes a million objects, nearly all of which stay: imports, parsers, networks. Python looks
through all of them again and again for cycles that nobody refers to, a fifth of start-up's time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["resume", "without_collection"]

_paused: list[bool] = []


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for no cycles in the block, or until `resume`; a collector that is off stays off."""
    _paused.append(gc.isenabled())
    gc.disable()
    try:
        yield
    finally:
        if _paused.pop():
            gc.enable()


def resume() -> None:
    """Look for cycles again, within a block too, if it was done before."""
    if _paused and _paused[0]:
        gc.enable()
