r"""Scores of samples from choices among them: the Bradley-Terry model, and Luce's for more.

A person chooses sample i of a set S with probability :math:`e^{s_i} / \sum_{j \in S} e^{s_j}`; of a
pair that is :math:`\sigma(s_i - s_j)`. Scores maximise the likelihood of the choices under a normal
prior of precision :math:`\lambda`,

.. math::
    \sum_v \Big( \sum_{i \in S_v} w_{vi} s_i - \log \sum_{j \in S_v} e^{s_j} \Big)
    - \frac{\lambda}{2} \sum_i s_i^2 ,

where w is 1 for the chosen sample; where none was better, each has an equal share. The prior keeps
scores finite where a sample was never rejected. The sum is concave; Newton's method finds its one
maximum. Scores of samples that were compared with each other have mean 0.

References:
    Rank Analysis of Incomplete Block Designs (Bradley and Terry, 1952)
    Individual Choice Behavior (Luce, 1959)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Choice", "bradley_terry", "wins"]

_STEPS, _TOLERANCE = 100, 1e-12


class Choice(NamedTuple):
    """One answer.

    Attributes:
        shown: Numbers of the samples that were compared, two or more.
        chosen: The one that was the best; None where none was.
    """

    shown: tuple[int, ...]
    chosen: int | None


def bradley_terry(num_samples: int, choices: Sequence[Choice], prior: float = 1.0) -> Tensor:
    """Return the scores of samples, float64 [num_samples], NaN where one was never compared.

    Args:
        num_samples: M.
        choices: Answers, in any order.
        prior: Precision of the scores' normal prior, above 0.
    """
    shown = torch.zeros(len(choices), num_samples, dtype=torch.float64)
    weight = torch.zeros_like(shown)
    for row, choice in enumerate(choices):
        shown[row, list(choice.shown)] = 1.0
        best = list(choice.shown) if choice.chosen is None else [choice.chosen]
        weight[row, best] = 1.0 / len(best)
    scores = _maximum(shown, weight.sum(dim=0), prior)
    return scores.masked_fill(shown.sum(dim=0) == 0, torch.nan)


def wins(num_samples: int, choices: Sequence[Choice]) -> Tensor:
    """Return the share of its comparisons that each sample won, float64 in [0, 1].

    Where none was better each has an equal share. NaN where a sample was never compared.
    """
    won, compared = (torch.zeros(num_samples, dtype=torch.float64) for _ in range(2))
    for choice in choices:
        best = list(choice.shown) if choice.chosen is None else [choice.chosen]
        won[best] += 1.0 / len(best)
        compared[list(choice.shown)] += 1.0
    return won / compared


def _maximum(shown: Tensor, total: Tensor, prior: float) -> Tensor:
    """Return the scores [M] at the maximum.

    Args:
        shown: 1 where a choice showed a sample, [V, M].
        total: Shares of choices of each sample, summed over choices, [M].
        prior: As in `bradley_terry`.
    """
    scores = torch.zeros_like(total)
    value = _objective(scores, shown, total, prior)
    for _ in range(_STEPS):
        p = _probabilities(scores, shown)
        gradient = total - p.sum(dim=0) - prior * scores
        if gradient.abs().max() < _TOLERANCE:
            break
        curvature = torch.diag(p.sum(dim=0) + prior) - p.T @ p
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while size > _TOLERANCE:
            moved = scores + size * step
            if (new := _objective(moved, shown, total, prior)) >= value:
                break
            size /= 2
        else:
            break  # the maximum, to rounding
        scores, value = moved, new
    return scores


def _probabilities(scores: Tensor, shown: Tensor) -> Tensor:
    return scores.expand_as(shown).masked_fill(shown == 0, -torch.inf).softmax(dim=1)


def _objective(scores: Tensor, shown: Tensor, total: Tensor, prior: float) -> Tensor:
    logits = scores.expand_as(shown).masked_fill(shown == 0, -torch.inf)
    return (total * scores).sum() - logits.logsumexp(dim=1).sum() - prior / 2 * (scores**2).sum()
