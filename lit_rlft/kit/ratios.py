"""Ratios of two sums over samples, such as stable atoms over atoms, and their standard errors."""

import math

import torch
from torch import Tensor

__all__ = ["Ratio", "error_of_mean", "error_of_ratio", "ratio", "ratio_parts"]

Ratio = tuple[Tensor, Tensor]
"""What each sample adds to the ratio's part and to its whole, [n] each."""


def ratio(parts: Tensor, wholes: Tensor) -> float:
    """Return the sum of parts [n] over that of wholes [n].

    Samples with NaN do not count. NaN where nothing is left to divide by.
    """
    known = ~(parts.isnan() | wholes.isnan())
    whole = float(wholes[known].double().sum())
    return float(parts[known].double().sum()) / whole if whole else math.nan


def ratio_parts(parts: Tensor, wholes: Tensor) -> Tensor:
    """Return how far each sample moves the ratio R, n (p_i - R w_i) / sum w, [n], mean 0.

    The ratio's error is that of the mean of these, to first order. NaN where there is no ratio.
    """
    known = ~(parts.isnan() | wholes.isnan())
    p, w = (values.double().where(known, 0) for values in (parts, wholes))
    return (p - ratio(parts, wholes) * w) / w.mean()


def error_of_ratio(
    own: Ratio, other: Ratio | None = None, *, groups: Tensor | None = None
) -> float:
    """Return the standard error of a ratio, or of its difference from another's, to first order.

    Args:
        own: Parts and wholes.
        other: Those of another model under the same conditions and noise.
        groups: As in `error_of_mean`.
    """
    beside = None if other is None else ratio_parts(*other)
    return error_of_mean(ratio_parts(*own), beside, groups=groups)


def error_of_mean(
    values: Tensor, other: Tensor | None = None, *, groups: Tensor | None = None
) -> float:
    """Return the standard error of the mean of values [n], or of values - other; NaN for n < 2.

    Args:
        values: [n].
        other: [n], subtracted.
        groups: int64 [n], whose members depend on each other, as samples of one condition do.
            Groups are then what was drawn: the error is that of other groups (clustered). None, or
            one group alone, takes values as independent.
    """
    differences = values.double() if other is None else values.double() - other.double()
    n = len(differences)
    if n < 2:
        return math.nan
    labels, places = (None, None) if groups is None else torch.unique(groups, return_inverse=True)
    if labels is None or places is None or len(labels) == 1:
        return float(differences.std()) / math.sqrt(n)
    sums = differences.new_zeros(len(labels))
    sums.index_add_(0, places.to(sums.device), differences - differences.mean())
    return float((sums.square().sum() * len(labels) / (len(labels) - 1)).sqrt()) / n
