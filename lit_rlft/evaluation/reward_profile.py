r"""When a reward is decided on the way from noise to data, and what a cut of P-GRAFT could keep.

States :math:`x_t` of the reference's trajectories are completed several times with fresh noise.
Then :math:`V(t) = E\,\mathrm{Var}(r(x_0) \mid x_t)` is the variance between completions of one
state. :math:`V(t) / \mathrm{Var}\, r` is the share of the reward's variance within a condition that
:math:`x_t` leaves open: 0 at the data; at :math:`x_1`, what the first noise leaves open.

The second number is what a cut at t could gain at best. Candidates are accepted by their own
reward, as P-GRAFT does, and the reference completes their :math:`x_t` anew. A perfect fit of the
accepted :math:`x_t` gains the mean of these completions above that of all states; without a cut it
gains what the accepted candidates themselves have. The quotient is 1 - V/Var r where rewards are
normal.

References:
    P-GRAFT (2025), https://arxiv.org/abs/2510.02692 (V(t) and the choice of the cut)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import seed_from
from lit_rlft.core.state import batch_size, index, leaves
from lit_rlft.core.streams import Stream
from lit_rlft.kit.ratios import error_of_ratio, ratio
from lit_rlft.loop.rollouts import Rollouts, Scores
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["Level", "Profiled", "levels_of", "profile", "suggested"]


class Profiled(NamedTuple):
    """Rewards of candidates and of the completions of their states.

    Attributes:
        rewards: [n, M], of M candidates of each condition.
        weights: [n, M], how much each counts in a fit: 1 where it is accepted, or else 0, or any.
        completions: By index k of the sampler's grid, [n, M, R]: of R completions of the
            candidates' states at times[k].
    """

    rewards: Tensor
    weights: Tensor
    completions: Mapping[int, Tensor]


class Level(NamedTuple):
    """One level of the profile.

    Attributes:
        step: Index into the sampler's grid.
        cut: f, the share of the sampler's steps below it.
        time: t.
        open_share: V(t) / Var r.
        open_share_sem: Its standard error over conditions.
        kept: What a perfect fit of the accepted x_t gains, as a share of the gain without a cut.
        kept_sem: Its standard error over conditions.
    """

    step: int
    cut: float
    time: float
    open_share: float
    open_share_sem: float
    kept: float
    kept_sem: float


def profile(
    rollouts: Rollouts,
    route: Route,
    condition: Condition,
    seeds: Sequence[int],
    steps: Sequence[int],
    num_completions: int,
) -> tuple[Scores, dict[int, Tensor]]:
    """Draw candidates and complete their states.

    Args:
        rollouts: Draws and scores.
        route: The reference's; it must draw noise on the way.
        condition: N rows, one per candidate.
        seeds: N integers.
        steps: Indices into the route's grid, below its last one.
        num_completions: R, completions per state.

    Returns:
        The candidates' scores, and the completions' rewards by step, [N, R].
    """
    strict = partial(Scoring, rollouts, training=False, may_fail=False)
    scoring, last = strict(), route.num_steps
    *states, x_0 = rollouts.draw(route, condition, seeds, keep=[*steps, last], drawn=scoring.drawn)
    candidates = scoring.finish(x_0, condition, seeds, world_size=1)
    found = {}
    for k, x in zip(steps, states, strict=True):
        rows = torch.arange(batch_size(x)).repeat_interleave(num_completions)
        own = [
            seed_from(seed, Stream.COMPLETION, k, j)
            for seed in seeds
            for j in range(num_completions)
        ]
        again = condition.repeat(num_completions)
        x_k = index(x, rows.to(leaves(x)[0].device))
        label = f"Completing from step {k}"
        x_0 = rollouts.complete(route, again, own, x_k, first=k, label=label)
        scores = strict().finish(x_0, again, own, world_size=1)
        found[k] = scores.rewards.cpu().view(-1, num_completions)
    return candidates, found


def levels_of(profiled: Profiled, times: Tensor) -> list[Level]:
    """Return the profile's levels, from noise to data.

    Args:
        profiled: The rewards; at least two candidates, two completions and two conditions.
        times: The sampler's grid, [num_steps + 1].
    """
    total = _total_variance(profiled)
    without_cut = _gain(profiled.weights, profiled.rewards)
    levels = []
    for k, rewards in sorted(profiled.completions.items()):
        rewards = rewards.double()
        within = rewards.var(dim=2).mean(dim=1)
        gain = _gain(profiled.weights, rewards.mean(dim=2))
        share = (ratio(within, total), error_of_ratio((within, total)))
        kept = (ratio(gain, without_cut), error_of_ratio((gain, without_cut)))
        num_steps = len(times) - 1
        levels.append(Level(k, (num_steps - k) / num_steps, float(times[k]), *share, *kept))
    return levels


def suggested(levels: Sequence[Level], most_open: float) -> Level | None:
    """Return the noisiest level at which no more than a share of the variance is open, or None.

    The initial noise is none: with a cut of 1 nothing would be trained.
    """
    cuts = [level for level in levels if level.cut < 1]
    return next((level for level in cuts if level.open_share <= most_open), None)


def _total_variance(profiled: Profiled) -> Tensor:
    """Return an unbiased estimate of Var r within each condition, [n].

    The candidates give one, and each level one more: the completions of different states are
    independent, so that the variance of their means holds that within the states once in R.
    """
    estimates = [profiled.rewards.double().var(dim=1)]
    for rewards in profiled.completions.values():
        within = rewards.double().var(dim=2).mean(dim=1)
        between = rewards.double().mean(dim=2).var(dim=1)
        estimates.append(between + within * (1 - 1 / rewards.shape[2]))
    return torch.stack(estimates).mean(dim=0)


def _gain(weights: Tensor, rewards: Tensor) -> Tensor:
    """Return the weighted sum of what rewards have above their condition's mean, [n]."""
    above = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    return (above * weights).sum(dim=1)
