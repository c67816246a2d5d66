"""Chemical elements of the domain: the two vocabularies, valences and atomic numbers."""

from collections.abc import Sequence

from lit_rlft.core.checks import UsageError

__all__ = [
    "ATOMIC_NUMBERS",
    "EXPLICIT",
    "HEAVY",
    "SYMBOLS",
    "VALENCES",
    "check_elements",
    "valences",
]

EXPLICIT: tuple[str, ...] = ("H", "C", "N", "O", "F")
"""Elements where every atom is one of the model's, in the order of EDM's one-hot vectors."""

HEAVY: tuple[str, ...] = ("C", "N", "O", "F")
"""Elements where hydrogens are not the model's but fill valences in."""

VALENCES: dict[str, int] = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
"""Bonds of a neutral atom, double and triple ones counted two and three times."""

ATOMIC_NUMBERS: dict[str, int] = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}

SYMBOLS: dict[int, str] = {number: symbol for symbol, number in ATOMIC_NUMBERS.items()}
"""Symbol by atomic number."""


def check_elements(elements: Sequence[str]) -> tuple[str, ...]:
    """Return the elements as a tuple.

    Raises:
        UsageError: There are none, one occurs twice, or one has no bond lengths in the tables.
    """
    symbols = tuple(elements)
    if not symbols or len(set(symbols)) != len(symbols) or not set(symbols) <= set(VALENCES):
        raise UsageError(
            f"elements must be some of {list(VALENCES)}, each once, got {list(symbols)}"
        )
    return symbols


def valences(elements: Sequence[str]) -> list[int]:
    """Return the valence of each element."""
    return [VALENCES[symbol] for symbol in elements]
