"""Errors that are the user's to mend."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """Settings or input that cannot work; the message names the key and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """
