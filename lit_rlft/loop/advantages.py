"""Advantages over all processes of a run, the same for any number of them."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lit_rlft.core.advantage import Advantage, constant_groups
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.distributed import gather

__all__ = ["compare"]


def compare(
    rewards: Tensor,
    condition: Condition,
    seeds: Sequence[int],
    *,
    advantage: Advantage,
    clip: float | None,
    source: str,
    world_size: int,
) -> tuple[Tensor, dict[str, float]]:
    """Compare rewards with those of all processes; all of them must call this.

    Args:
        rewards: [G * M], the candidates of one condition side by side; not finite where the
            reward failed.
        condition: G rows.
        seeds: G integers, one per group, which order the groups of all processes.
        advantage: The rule that picks each sample's peers.
        clip: Advantages are clamped to this size; None leaves them alone.
        source: Name of the reward.
        world_size: Number of processes.

    Returns:
        Advantages, float64 [G * M], and what to log, of all processes together.

    Raises:
        UsageError: The reward failed for all samples.
    """
    names = [str(sorted(entry.items())) for entry in condition.each()]
    grouped = rewards.cpu().double().view(len(seeds), -1)
    own = list(zip(seeds, names, grouped.tolist(), strict=True))
    # In the order of the seeds, which does not depend on the number of processes.
    groups = sorted(chain(*gather(own, world_size)), key=lambda group: group[0])
    everyone = torch.tensor([values for *_, values in groups], dtype=torch.float64)
    known = everyone[everyone.isfinite()]
    if not len(known):
        raise UsageError(
            f"{source} failed for all {everyone.numel()} samples of the round: it returned no "
            "finite number; fix the reward before training on it"
        )
    names = [name for _, name, _ in groups]
    advantages = advantage(everyone, names, clip)
    by_seed = {seed: row for (seed, *_), row in zip(groups, advantages, strict=True)}
    return torch.cat([by_seed[seed] for seed in seeds]), {
        "reward": float(known.mean()),
        "failed_rewards": 1 - len(known) / everyone.numel(),
        "advantage_std": float(advantages.std(correction=0)),
        "zero_variance_groups": constant_groups(everyone),
    }
