"""Errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BadArgument", "UsageError", "loading", "require"]


class UsageError(ValueError):
    """Settings or input that cannot work; the message names the key and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


class BadArgument(UsageError):
    """An argument with an impossible value: "TopK: k must be at least 1, got 0".

    The command line writes the argument's key in the config in place of class and argument.

    Args:
        owner: Whose argument it is.
        argument: Its name.
        problem: What is wrong with it, and what to do.
    """

    def __init__(self, owner: object, argument: str, problem: str) -> None:
        self.owner, self.argument, self.problem = type(owner).__name__, argument, problem
        super().__init__(f"{self.owner}: {argument} {problem}")


def require(holds: bool, owner: object, argument: str, rule: str) -> None:
    """Raise BadArgument, "<class of owner>: <argument> must be <rule>", unless the rule holds."""
    if not holds:
        raise BadArgument(owner, argument, f"must be {rule}")


@contextmanager
def loading(sentence: str) -> Iterator[None]:
    """Turn any error while reading a user's file into UsageError, "<sentence> (<reason>)".

    A UsageError raised in the block stays as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a file can hold anything, and every reader has its own errors
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{sentence} ({reason})") from error
