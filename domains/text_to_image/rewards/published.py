"""What rewards from published weights share: how tokenizers and weights are read, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from domains.text_to_image.networks.automatic import read_auto
from lit_rlft.core.checks import loading

__all__ = ["check_vocabulary", "read_tokenizer", "reading"]


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


def read_tokenizer(kind: Any, source: str, what: str, give: str) -> Any:
    """Return the tokenizer in a folder or of a hub id.

    Args:
        kind: Its class in transformers.
        source: What the user gave.
        what: What is read, with its article.
        give: What to give instead.

    Raises:
        UsageError: There is none.
    """
    with reading("tokenizer", source, what, give):
        words = read_auto(kind, source)
        if len(words) <= 2:  # transformers makes an empty one of nothing
            raise ValueError("its files are missing")
    return words


def check_vocabulary(known: int, words: Any, tokenizer: str) -> None:
    """Raise ValueError where a tokenizer has more tokens than a network knows."""
    if len(words) > known:
        raise ValueError(
            f"it knows {known} tokens, the tokenizer {tokenizer!r} has {len(words)}: they are of "
            "different models"
        )
