"""What rewards from published weights share: one sentence for all that goes wrong on reading."""

from collections.abc import Iterator
from contextlib import contextmanager

from lit_rlft.core.checks import loading

__all__ = ["reading"]


@contextmanager
def reading(key: str, source: str, kind: str, give: str) -> Iterator[None]:
    """Turn any error into UsageError, "<key>: <source> could not be loaded as <kind>; give ...".

    Args:
        key: The setting.
        source: What the user gave.
        kind: What is read, with its article.
        give: What to give instead.
    """
    with loading(f"{key}: {source!r} could not be loaded as {kind}; give {give}"):
        yield
