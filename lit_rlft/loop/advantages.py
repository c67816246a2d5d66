"""Advantages over all processes of a run, the same for any number of them.

References:
    GDPO (Liu et al., 2026; each reward normalised for itself), https://arxiv.org/abs/2601.05242
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.advantage import (
    Advantage,
    BatchAdvantage,
    LeaveOneOutAdvantage,
    constant_groups,
)
from lit_rlft.core.checks import require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum, all_failed
from lit_rlft.core.state import State
from lit_rlft.distributed import gather
from lit_rlft.loop.scoring import Scoring

__all__ = ["Judged", "check_decoupled", "compare", "judge"]


def check_decoupled(reward: Reward, advantage: Advantage, owner: object) -> None:
    """Raise BadArgument unless a reward has several parts whose advantages can be added."""
    several = isinstance(reward, WeightedSum) and len(reward.counted) > 1
    wanted = f"false for {reward.name}: there are no several rewards; or set reward to WeightedSum"
    require(several, owner, "decoupled_rewards", wanted)
    rule = (
        "false beside LeaveOneOutAdvantage, which leaves each part in its own unit; set it to "
        "false, or model.init_args.advantage to GroupAdvantage"
    )
    require(not isinstance(advantage, LeaveOneOutAdvantage), owner, "decoupled_rewards", rule)


class Judged(NamedTuple):
    """Advantages float64 [G * M], what to log, and the distributions to show."""

    advantages: Tensor
    metrics: dict[str, float]
    histograms: dict[str, Tensor]


def judge(
    scoring: Scoring,
    x_0: State,
    condition: Condition,
    seeds: Sequence[int],
    *,
    advantage: Advantage,
    clip: float | None,
    world_size: int,
) -> Judged:
    """Score samples and compare their rewards with those of all processes, which all call this.

    Args:
        scoring: Decodes and scores; where it does so by part, parts are compared each for itself.
        x_0: G * M samples, the candidates of one condition side by side.
        condition: G rows.
        seeds: G * M integers, one per sample.
        advantage: As in `compare`.
        clip: As in `compare`.
        world_size: Number of processes.

    Raises:
        UsageError: The reward failed for all samples.
    """
    num, reward = len(seeds) // len(condition), scoring.rollouts.reward
    weights = _weights(reward) if scoring.by_part else (1.0,)
    candidates = condition.repeat(num)
    rewards = scoring.finish(x_0, candidates, seeds, world_size).rewards.cpu()
    advantages, metrics = compare(
        rewards,
        condition,
        seeds[::num],
        advantage=advantage,
        clip=clip,
        source=None if reward.asks else reward.name,
        world_size=world_size,
        weights=weights,
        finite=scoring.finite,
    )
    sums = _summed(rewards.view(len(seeds), -1), weights)
    shown = {"reward": sums[sums.isfinite()], "advantage": advantages}
    return Judged(advantages, metrics, shown)


def compare(
    rewards: Tensor,
    condition: Condition,
    seeds: Sequence[int],
    *,
    advantage: Advantage,
    clip: float | None,
    source: str | None,
    world_size: int,
    weights: Sequence[float] = (1.0,),
    finite: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """Compare rewards with those of all processes; all of them must call this.

    Several rewards are compared each for itself; the sum of their advantages, weighted, is then
    compared over the round (GDPO), so that its size does not depend on their number.

    Args:
        rewards: [G * M] or [G * M, P], candidates side by side; not finite where one failed.
        condition: G rows.
        seeds: G integers, one per group, which order the groups of all processes.
        advantage: The rule that picks each sample's peers.
        clip: Advantages are clamped to this size; None leaves them alone.
        source: Name of the reward; None where there may be none at all, as from a person.
        world_size: Number of processes.
        weights: P weights of the rewards, whose weighted sum is logged.
        finite: Whether any sample is; otherwise the reward is not to blame.

    Returns:
        Advantages, float64 [G * M], and what to log, of all processes together.

    Raises:
        UsageError: The reward failed for all samples.
    """
    names = [str(sorted(entry.items())) for entry in condition.each()]
    grouped = rewards.cpu().double().view(len(seeds), -1, len(weights))
    own = list(zip(seeds, names, grouped.tolist(), strict=True))
    # In the order of the seeds, which does not depend on the number of processes.
    groups = sorted(chain(*gather(own, world_size)), key=lambda group: group[0])
    parts = torch.tensor([values for *_, values in groups], dtype=torch.float64)
    everyone = _summed(parts, weights)
    known = _known(everyone, source, finite, world_size)
    advantages = _advantages(parts, weights, [name for _, name, _ in groups], advantage, clip)
    by_seed = {seed: row for (seed, *_), row in zip(groups, advantages, strict=True)}
    return torch.cat([by_seed[seed] for seed in seeds]), {
        "reward": float(known.mean()),
        "failed_rewards": 1 - len(known) / everyone.numel(),
        "advantage_std": float(advantages.std(correction=0)),
        "zero_variance_groups": constant_groups(everyone),
    }


def _weights(reward: Reward) -> list[float]:
    """Return the weights of a sum's parts, in the order in which they are scored."""
    assert isinstance(reward, WeightedSum)
    return [reward.weights[name] for name in reward.counted]


def _summed(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    return (rewards.double() * rewards.new_tensor(weights, dtype=torch.float64)).sum(dim=-1)


def _known(rewards: Tensor, source: str | None, finite: bool, world_size: int) -> Tensor:
    """Return the rewards of samples that did not fail; raise UsageError where all did."""
    known = rewards[rewards.isfinite()]
    if not len(known) and source is not None:
        finite = any(gather(finite, world_size))
        raise all_failed(source, rewards.numel(), finite=finite)
    return known


def _advantages(
    parts: Tensor,
    weights: Sequence[float],
    names: Sequence[str],
    advantage: Advantage,
    clip: float | None,
) -> Tensor:
    """Return the advantages [G, M] of one or of several rewards, [G, M, P]."""
    if len(weights) == 1:
        return advantage(parts[..., 0] * weights[0], names, clip)
    # A sample with a part that failed teaches nothing, nor is it a peer in its other parts.
    failed = ~parts.isfinite().all(dim=-1)
    parts = parts.masked_fill(failed.unsqueeze(-1), torch.nan)
    total = torch.zeros(parts.shape[:2], dtype=torch.float64)
    for i, weight in enumerate(weights):
        # A rule that remembers conditions keeps each reward's apart.
        total += weight * advantage(parts[..., i], [f"{i} {name}" for name in names])
    return BatchAdvantage()(total.masked_fill(failed, torch.nan), names, clip)
