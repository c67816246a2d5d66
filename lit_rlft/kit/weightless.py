"""Models without weights: their sizes alone, for what only has to know those."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lit_rlft.core.checks import UsageError

__all__ = ["check_cached", "weightless", "without_weights"]

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block, loaders that can build a network of its config alone, on the meta device.

    They read no weights and download nothing. Loaders that do not ask `weightless` load as ever.
    """
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


def weightless() -> bool:
    """Return whether networks are to be built without weights."""
    return _weightless.get()


@contextmanager
def check_cached(source: str, key: str) -> Iterator[None]:
    """Turn what a missing file raises into one sentence with the remedy.

    Args:
        source: A folder or a hub id that is read in the block.
        key: The setting that holds it.

    Raises:
        UsageError: A config is neither in the folder nor in the hub's cache.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{key}: the configs of {source!r} are neither in a folder nor in the hub's cache, and "
            f"plan downloads nothing; run `hf download {source} --include '*.json' "
            "--include '*.txt'`, or give a folder with its config.json files (weights are not "
            "needed)"
        ) from error
