"""Checks of settings that several domains' rewards share."""

from lit_rlft.core.checks import require

__all__ = ["positive"]


def positive(owner: object, name: str, value: float) -> float:
    """Return a setting of a class.

    Args:
        owner: Whose setting it is.
        name: Its name.
        value: Its value.

    Raises:
        BadArgument: It is not above 0.
    """
    require(value > 0, owner, name, f"positive, got {value}")  # also NaN is none
    return value
