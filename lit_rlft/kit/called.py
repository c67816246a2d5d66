"""Numbers that somebody else's function returns for samples."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_rlft.core.checks import UsageError

__all__ = ["name_of", "numbers_of"]


def name_of(function: Callable[..., Any], default: str) -> str:
    """Return the name under which a function's numbers are reported."""
    return str(getattr(function, "__name__", default))


def numbers_of(function: Callable[..., Any], noun: str, *samples: Sequence[Any]) -> list[float]:
    """Call a reward's function; return a number per sample, NaN for None.

    Args:
        function: Takes lists with an entry per sample.
        noun: What the samples are, e.g. "pictures".
        *samples: The lists, of one length.

    Raises:
        UsageError: It returns no numbers, or not one per sample.
    """
    name, wanted = name_of(function, "the function"), len(samples[0])
    advice = f"return one number, or None, for each of the {noun}"
    try:
        inspect.signature(function).bind(*samples)
    except TypeError as error:
        raise UsageError(
            f"reward.init_args.function: {name}: {error}; it is called with {len(samples)} "
            f"{'list' if len(samples) == 1 else 'lists'}, of {noun} first"
        ) from error
    except ValueError:  # functions of compiled modules may have no signature
        pass
    returned = function(*(list(part) for part in samples))
    if isinstance(returned, str | Mapping):
        kind = type(returned).__name__
        raise UsageError(f"reward.init_args.function: {name} returned a {kind}; {advice}")
    try:
        values = [math.nan if value is None else float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise UsageError(f"reward.init_args.function: {name}: {error}; {advice}") from error
    if len(values) != wanted:
        raise UsageError(
            f"reward.init_args.function: {name} returned {len(values)} numbers for {wanted} "
            f"{noun}; {advice}"
        )
    return values
