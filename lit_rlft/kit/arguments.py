"""Checks of settings that several domains' rewards share."""

from lit_rlft.core.checks import UsageError

__all__ = ["positive"]


def positive(name: str, value: float) -> float:
    """Return a setting of a reward.

    Raises:
        UsageError: It is not above 0.
    """
    if not value > 0:  # also NaN
        raise UsageError(f"reward.init_args.{name} must be positive, got {value}")
    return value
