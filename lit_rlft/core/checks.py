"""Errors that are the user's to mend."""

__all__ = ["UsageError", "require"]


class UsageError(ValueError):
    """Settings or input that cannot work; the message names the key and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


def require(holds: bool, setting: str, rule: str) -> None:
    """Raise UsageError, "model.init_args.<setting> must be <rule>", unless the rule holds."""
    if not holds:
        raise UsageError(f"model.init_args.{setting} must be {rule}")
