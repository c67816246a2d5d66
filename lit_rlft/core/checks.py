"""Errors that are the user's to mend."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "loading", "require"]


class UsageError(ValueError):
    """Settings or input that cannot work; the message names the key and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


def require(holds: bool, setting: str, rule: str) -> None:
    """Raise UsageError, "model.init_args.<setting> must be <rule>", unless the rule holds."""
    if not holds:
        raise UsageError(f"model.init_args.{setting} must be {rule}")


@contextmanager
def loading(sentence: str) -> Iterator[None]:
    """Raise UsageError, "<sentence> (<reason>)", for whatever reading a file of the user's raises.

    A UsageError of the block's own stays as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a file can hold anything, and every reader has its own errors
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{sentence} ({reason})") from error
