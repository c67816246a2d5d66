r"""Standard errors of numbers of different kinds among samples, such as different molecules.

A bootstrap does not give them: samples that are drawn twice are repeats. Deleting one sample at a
time gives up to sqrt(2) times the deviation where hardly any kind is met twice, and more where most
are met often. Here the variance of the number D of kinds among n samples is

.. math::
    \mathrm{Var}\, D = E[D_{2n} - D_n] - E[f_1]^2 / n,

with f_1 kinds met once and f_2 twice. The first term, the kinds that n more samples would add, is
Chao's estimate f_0 (1 - exp(-f_1 / f_0)) with f_0 = f_1^2 / (2 f_2).

References:
    Nonparametric Estimation of the Number of Classes in a Population (Chao, 1984)
    Predicting the Number of New Species in Further Taxonomic Sampling (Shen, Chao and Lin, 2003)
"""

import math
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from lit_rlft.kit.ratios import error_of_mean

__all__ = ["KindCount", "kind_error", "text_number"]


@dataclass(frozen=True)
class KindCount:
    """The sum of the weights of the kinds that samples have, plus a sum over samples.

    Attributes:
        kinds: [n] int64, the kind of each sample.
        weights: [n], the weight of each sample's kind, one of few values; 0 where it does not
            count.
        linear: [n], what each sample adds besides.
    """

    kinds: Tensor
    weights: Tensor
    linear: Tensor


def kind_error(
    own: KindCount, other: KindCount | None = None, *, groups: Tensor | None = None
) -> float:
    """Return the standard error of a count, or of own - other; NaN for fewer than two samples.

    Args:
        own: Of n samples.
        other: Of n samples that are pairs with the first.
        groups: As in `error_of_mean`. Groups take the place of samples then: a kind is met once
            that one group alone has.
    """
    if len(own.kinds) < 2:
        return math.nan
    units = torch.arange(len(own.kinds)) if groups is None else groups
    counts = [_times_met(count, units) for count in (own, other) if count is not None]
    moves = _moves(own, counts[0], units)
    variance = _excess(own, counts[0], units)
    if other is not None:
        moves = moves - _moves(other, counts[1], units)
        variance += _excess(other, counts[1], units)
        variance -= 2 * _common(own, other, counts, units)
    variance += (len(moves) * error_of_mean(moves, groups=groups)) ** 2
    return math.sqrt(max(variance, 0.0))


def _times_met(count: KindCount, units: Tensor) -> Tensor:
    """Return in how many units each sample's kind is met, [n]; 0 where it does not count."""
    counted = count.weights != 0
    once = counted & _first(units, count.kinds, counted)
    kinds, times = torch.unique(count.kinds[once], return_counts=True)
    met = torch.zeros_like(count.kinds)
    met[counted] = times[torch.searchsorted(kinds, count.kinds[counted])]
    return met


def _first(*columns: Tensor) -> Tensor:
    """Return which samples are the first that have their values in these columns, bool [n]."""
    _, places = torch.unique(torch.stack(columns, dim=1).long(), dim=0, return_inverse=True)
    order = places.argsort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = places[order][1:] != places[order][:-1]
    return torch.zeros_like(new).index_put((order,), new)


def _moves(count: KindCount, met: Tensor, units: Tensor) -> Tensor:
    """Return by how much the count falls without each sample, [n]; summed, without each unit."""
    alone = (met == 1) & _first(units, count.kinds, met > 0)
    return count.weights.double() * alone + count.linear.double()


def _excess(count: KindCount, met: Tensor, units: Tensor) -> float:
    """Return what the variance is more than that of the moves."""
    excess, first = 0.0, _first(units, count.kinds, met > 0)
    for weight in _values(count.weights):
        here = first & (count.weights == weight)
        once, twice = (int(((met == times) & here).sum()) for times in (1, 2))
        excess += weight**2 * _added_beyond(once, twice // 2)
    return excess


def _common(own: KindCount, other: KindCount, counts: list[Tensor], units: Tensor) -> float:
    """Return the same of the covariance: pairs of kinds that are met together alone."""
    once, twice = ((counts[0] == times) & (counts[1] == times) for times in (1, 2))
    pairs = torch.stack([own.kinds, other.kinds], dim=1)
    first = _first(units, own.kinds, other.kinds, counts[0] > 0, counts[1] > 0)
    total = 0.0
    for a in _values(own.weights):
        for b in _values(other.weights):
            here = first & (own.weights == a) & (other.weights == b)
            _, times = torch.unique(pairs[twice & here], dim=0, return_counts=True)
            total += a * b * _added_beyond(int((once & here).sum()), int((times == 2).sum()))
    return total


def _values(weights: Tensor) -> list[float]:
    return sorted(set(weights[weights != 0].tolist()))


def _added_beyond(once: int, twice: int) -> float:
    """Return the kinds that as many samples would add, less those met once."""
    if not once:
        return 0.0
    unseen = once**2 / (2 * twice) if twice else once * (once - 1) / 2
    return unseen * -math.expm1(-once / unseen) - once if unseen else 0.0


def text_number(text: str) -> int:
    """Return a number by which a text is told from others, of 64 bits with a sign.

    The same in every process. A million texts have one number twice in 4e7 sets.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
