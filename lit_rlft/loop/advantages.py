"""Advantages over all processes of a run, the same for any number of them."""

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import torch
from lightning import Trainer
from torch import Tensor

from lit_rlft.core.advantage import Advantage, constant_groups
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.distributed import gather

__all__ = ["Comparing", "compare"]


class Comparing(Protocol):
    """An algorithm that compares rewards.

    Attributes:
        advantage: Whose rewards a sample's is compared with.
        advantage_clip: Advantages are clamped to this size; None leaves them alone.
        reward: Where the rewards are from.
    """

    advantage: Advantage
    advantage_clip: float | None
    reward: Reward

    @property
    def trainer(self) -> Trainer:
        """What knows the number of processes."""


def compare(
    tuner: Comparing, rewards: Tensor, condition: Condition, seeds: Sequence[int]
) -> tuple[Tensor, dict[str, float]]:
    """Compare rewards with those of all processes; all of them must call this.

    Args:
        tuner: The algorithm.
        rewards: [G * M], the candidates of one condition side by side; not finite where the
            reward failed.
        condition: G rows.
        seeds: G integers, one per group, which order the groups of all processes.

    Returns:
        Advantages, float64 [G * M], and what to log, of all processes together.

    Raises:
        UsageError: The reward failed for all samples.
    """
    names = [str(sorted(entry.items())) for entry in condition.each()]
    grouped = rewards.cpu().double().view(len(seeds), -1)
    own = list(zip(seeds, names, grouped.tolist(), strict=True))
    # In the order of the seeds, which does not depend on the number of processes.
    groups = sorted(chain(*gather(own, tuner.trainer.world_size)), key=lambda group: group[0])
    everyone = torch.tensor([values for *_, values in groups], dtype=torch.float64)
    known = everyone[everyone.isfinite()]
    if not len(known):
        raise UsageError(
            f"{tuner.reward.name} failed for all {everyone.numel()} samples of the round: it "
            "returned no finite number; mend the reward before training on it"
        )
    names = [name for _, name, _ in groups]
    advantages = tuner.advantage(everyone, names, tuner.advantage_clip)
    by_seed = {seed: row for (seed, *_), row in zip(groups, advantages, strict=True)}
    return torch.cat([by_seed[seed] for seed in seeds]), {
        "reward": float(known.mean()),
        "failed_rewards": 1 - len(known) / everyone.numel(),
        "advantage_std": float(advantages.std(correction=0)),
        "zero_variance_groups": constant_groups(everyone),
    }
