r"""How much of a reward's variance the initial noise explains, and whether conditions share it.

The same n initial noises are walked under each of C conditions. Of conditions c and noises x that
are drawn independently, every reward is a sum of orthogonal parts,

.. math::
    r(c, x) = m + A(c) + N(x) + I(c, x) + \epsilon,

with N the mean over conditions of what x_1 = x earns, I what it earns under c beside that, and
:math:`\epsilon` what is decided on the way: 0 with a deterministic sampler. The variances of the
parts are estimated without bias for rewards of any law (two-way analysis of variance, random
effects). Shares are of the variance within a condition, Var N + Var I + Var epsilon:

- *initial*, (Var N + Var I) / Var r: all that a choice of x_1 can earn; 1 without noise on the way.
- *common*, Var N / Var r: noise that is good for all conditions, what a prior without conditions
  can learn.
- *own*, Var I / Var r: what conditioning adds at most.

A Gaussian prior reaches less: moving its mean by mu costs :math:`|\mu|^2 / 2` nats and gains, to
first order, mu b with :math:`b = E[r x]`, thus :math:`|b| \sqrt{2 KL}` at best. The *linear* share
:math:`|b|^2 / Var r` says how much of the variance it can use (`linear_shares`).

Standard errors are jackknife errors over conditions and over noises, added (for U-statistics of two
samples). Each holds the part that depends on both, so they are rather too large than too small.

References:
    The Jackknife Estimate of Variance (Efron & Stein, 1981), https://doi.org/10.1214/aos/1176345462
    Jackknifing U-Statistics (Arvesen, 1969), https://doi.org/10.1214/aoms/1177697287 (two samples)
    Golden Noise for Diffusion Models (Zhou et al., 2024), https://arxiv.org/abs/2411.09502
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import seed_from
from lit_rlft.core.state import cat, tensor_of
from lit_rlft.core.streams import Stream
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.kit.ratios import error_of_mean
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["Components", "components", "crossed", "golden_gains", "linear_shares", "noise_shares"]


class Components(NamedTuple):
    """Variances of a reward's parts; unbiased, so that a small one may come out below 0.

    Attributes:
        condition: Var A, between conditions.
        noise: Var N, between initial noises, the same under all conditions.
        interaction: Var I, between initial noises, of each condition's own.
        rest: Var epsilon, decided on the way.
    """

    condition: float
    noise: float
    interaction: float
    rest: float


def crossed(
    rollouts: Rollouts,
    route: Route,
    condition: Condition,
    seeds: Sequence[int],
    num_completions: int = 1,
) -> Tensor:
    """Walk the same initial noises under every condition.

    Args:
        rollouts: Draws and scores.
        route: The reference's.
        condition: C rows, each another condition, with states of one size.
        seeds: n integers, one per initial noise.
        num_completions: R, walks from each x_1; 1 for a deterministic route, at least 2 otherwise.

    Returns:
        Rewards [C, n, R], NaN where scoring failed.

    Raises:
        UsageError: R does not fit the route, or states differ in size.
    """
    fits = num_completions == 1 if route.deterministic else num_completions >= 2
    if not fits:
        needed = "1" if route.deterministic else "at least 2, since this sampler draws noise"
        raise UsageError(f"num_completions must be {needed}, got {num_completions}")
    times, num = len(seeds), len(condition)
    cells = condition.repeat(times)
    chunks = rollouts.chunks(cells, list(seeds) * num)
    x_1 = cat([next(route.walk(chunk.condition, chunk.noise))[1] for chunk in chunks])
    first = tensor_of(x_1).view(num, times, -1)
    if not torch.equal(first, first[:1].expand_as(first)):
        raise UsageError("the initial noise depends on the condition here, so it cannot be crossed")
    again = [
        seed_from(seed, Stream.COMPLETION, c, j)
        for c in range(num)
        for seed in seeds
        for j in range(num_completions)
    ]
    walked = cells.repeat(num_completions)
    x_1 = tensor_of(x_1).repeat_interleave(num_completions, dim=0)
    x_0 = rollouts.complete(route, walked, again, x_1, label="Sampling (crossed)")
    scores = Scoring(rollouts, training=False).finish(x_0, walked, again, world_size=1)
    return scores.rewards.cpu().view(num, times, num_completions)


def components(rewards: Tensor) -> Components:
    """Return the variances of the parts.

    Args:
        rewards: [C, n, R] of C conditions, n initial noises and R walks of each; R = 1 says that
            nothing is decided on the way. C and n are at least 2.
    """
    rewards = rewards.double()
    num_conditions, num_noises, num_walks = rewards.shape
    cells = rewards.mean(dim=2)
    rest = float(rewards.var(dim=2).mean()) if num_walks > 1 else 0.0
    by_condition, by_noise = cells.mean(dim=1), cells.mean(dim=0)
    residuals = cells - by_condition.unsqueeze(1) - by_noise + cells.mean()
    both = float(residuals.square().sum()) / ((num_conditions - 1) * (num_noises - 1))
    return Components(
        float(by_condition.var()) - both / num_noises,
        float(by_noise.var()) - both / num_conditions,
        both - rest / num_walks,
        rest,
    )


def noise_shares(rewards: Tensor) -> dict[str, Moments]:
    """Return the variance within a condition, and the shares of it, with standard errors.

    Args:
        rewards: As `components` takes them; C and n are at least 3 for errors that are not NaN.
            Conditions with a reward that is not finite are left out.

    Returns:
        "variance", "initial", "common" and "own"; shares are NaN where there is no variance.
    """
    rewards = _known(rewards)
    return _measured(("variance", "initial", "common", "own"), rewards.shape, _numbers(rewards))


def linear_shares(rewards: Tensor, x_1: Tensor) -> dict[str, Moments]:
    """Return the shares of the variance within a condition that are linear in the initial noise.

    Args:
        rewards: As `components` takes them; C and n are at least 4 for errors that are not NaN.
            Conditions with a reward that is not finite are left out.
        x_1: [n, d], the initial noises, N(0, I); or their coordinates along d orthonormal
            directions, where a prior moves along these alone.

    Returns:
        "common" of one direction for all conditions and "each" of one for each condition, with
        standard errors. Without bias up to that of a quotient: one may come out below 0.
    """
    rewards = _known(rewards)
    return _measured(("common", "each"), rewards.shape, _linear_numbers(rewards, x_1.double()))


def golden_gains(rewards: Tensor) -> dict[str, Moments]:
    """Return what the best of the n initial noises gains above their mean, with standard errors.

    "common" takes for each condition the noise that is best on average over all *other* conditions:
    one noise for all. "own" takes each condition's own best, which is best of n; with several walks
    half of them choose and the others are counted. Errors are of the conditions, given the noises.

    Args:
        rewards: As `components` takes them. Conditions with a reward that is not finite are left
            out.
    """
    rewards = _known(rewards)
    num_walks = rewards.shape[2]
    half = num_walks // 2
    cells = rewards.mean(dim=2)
    others = cells.sum(dim=0) - cells
    own = rewards[..., : max(half, 1)].mean(dim=2).argmax(dim=1)
    counted = rewards[..., half:].mean(dim=2)
    chosen = {"common": (cells, others.argmax(dim=1)), "own": (counted, own)}
    found = {}
    for name, (values, best) in chosen.items():
        gains = values.gather(1, best.unsqueeze(1)).squeeze(1) - values.mean(dim=1)
        found[name] = {"mean": float(gains.mean()), "sem": error_of_mean(gains)}
    return found


def _known(rewards: Tensor) -> Tensor:
    return rewards[rewards.isfinite().flatten(1).all(dim=1)].double()


_Numbers = Callable[[Tensor, Tensor], list[float]]
"""Numbers of some conditions and some noises, given which."""


def _numbers(rewards: Tensor) -> _Numbers:
    def numbers(rows: Tensor, columns: Tensor) -> list[float]:
        if min(len(rows), len(columns)) < 2:
            return [math.nan] * 4
        _, noise, interaction, rest = components(rewards[rows][:, columns])
        within = noise + interaction + rest
        shares = (noise + interaction, noise, interaction)
        return [within, *(share / within if within > 0 else math.nan for share in shares)]

    return numbers


def _linear_numbers(rewards: Tensor, x_1: Tensor) -> _Numbers:
    products = x_1 @ x_1.T
    products.fill_diagonal_(0)  # different noises alone: E of their product is |b|^2

    def numbers(rows: Tensor, columns: Tensor) -> list[float]:
        num, noises = len(rows), len(columns)
        if min(num, noises) < 2:
            return [math.nan] * 2
        own = rewards[rows][:, columns]
        _, noise, interaction, rest = components(own)
        within = noise + interaction + rest
        cells = own.mean(dim=2)
        cells = cells - cells.mean(dim=1, keepdim=True)
        between = cells @ products[columns][:, columns] @ cells.T
        # What taking off the mean of n rewards leaves of the sum.
        left = noises * (noises - 1) * (1 - 2 / noises + 2 / noises**2)
        each, total = float(between.trace()), float(between.sum())
        squares = ((total - each) / (num * (num - 1)), each / num)
        return [square / left / within if within > 0 else math.nan for square in squares]

    return numbers


def _measured(names: Sequence[str], shape: torch.Size, numbers: _Numbers) -> dict[str, Moments]:
    """Return numbers with their jackknife errors, over conditions and over noises."""
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    by_condition = _jackknife(rows, lambda kept: numbers(kept, columns))
    by_noise = _jackknife(columns, lambda kept: numbers(rows, kept))
    errors = (by_condition + by_noise).sqrt().tolist()
    found = zip(names, numbers(rows, columns), errors, strict=True)
    return {name: {"mean": value, "sem": error} for name, value, error in found}


def _jackknife(whole: Tensor, numbers: Callable[[Tensor], list[float]]) -> Tensor:
    """Return the jackknife variance of each number."""
    left = torch.tensor([numbers(whole[whole != i]) for i in whole]).double()
    return (left - left.mean(dim=0)).square().sum(dim=0) * (len(whole) - 1) / len(whole)
