"""Errors as sentences."""

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_rlft.core.checks import UsageError

__all__ = ["sentence"]


def sentence(error: Exception) -> str | None:
    """Return what a user should read of an error that the user can fix, else None.

    Parsing wraps errors: the innermost one says what is wrong.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, UsageError):
            return str(cause)
    if not isinstance(error, ArgumentError | MisconfigurationException):
        return None
    # The innermost of these says what the parser's list of all alternatives buries.
    texts = [str(error), *(t for t in map(str, causes) if t.startswith("Problem with given class"))]
    return " ".join(texts[-1].split())
