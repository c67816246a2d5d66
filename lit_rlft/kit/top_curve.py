r"""The best scores so far over the number of scores: the area under their curve.

With :math:`b(n)` the mean of the best k of the first n scores, and budget N,

.. math:: A = \frac1N \int_0^N b(n)\,dn

by the trapezoid rule on the points 0, f, 2f, ... and the last score, from b(0) = 0. Beyond the last
score b stays as it is.

References:
    Sample Efficiency Matters: A Benchmark for Practical Molecular Optimization (Gao et al., 2022;
    N = 10,000, f = 100, k = 10), https://arxiv.org/abs/2206.12411
"""

import torch
from torch import Tensor

__all__ = ["area_under_top"]


def area_under_top(scores: Tensor, k: int, budget: int, every: int) -> float:
    """Return the area under the mean of the best k scores, in the scores' unit.

    Args:
        scores: [n], in the order of the calls; those beyond the budget do not count.
        k: How many of the best ones; all where there are fewer.
        budget: N, number of calls that the area is of.
        every: f, calls between two points of the curve.

    Returns:
        A; NaN where there are no scores.
    """
    scores = scores[:budget].double()
    if not len(scores):
        return float("nan")
    best, before, area = scores[:0], 0.0, 0.0
    for start in range(0, len(scores), every):
        part = scores[start : start + every]
        merged = torch.cat([best, part])
        best = merged.topk(min(k, len(merged))).values
        height = float(best.mean())
        area += len(part) * (before + height) / 2
        before = height
    return (area + (budget - len(scores)) * before) / budget
