"""The candidates of a round: several samples of each condition, drawn and scored."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.reward import all_failed
from lit_rlft.core.state import State
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, mean_of_all
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["Candidates", "draw_candidates"]


class Candidates(NamedTuple):
    """N samples, those of a condition side by side.

    Attributes:
        condition: N rows.
        seeds: N integers that all noise of a sample comes from.
        states: The states that were kept of each, by index of the grid as asked for.
        rewards: [N], NaN where scoring failed.
        keys: De-duplication keys, if the domain has any.
        reward: Mean reward over all processes.
        failed_rewards: Share that could not be scored, over all processes.
    """

    condition: Condition
    seeds: list[int]
    states: list[State]
    rewards: Tensor
    keys: list[Hashable] | None
    reward: float
    failed_rewards: float

    @property
    def known(self) -> Tensor:
        """The rewards that are known, [n]."""
        return self.rewards[self.rewards.isfinite()]


def draw_candidates(
    rollouts: Rollouts,
    route: Route,
    batch: Batch,
    condition: Condition,
    num: int,
    *,
    round_index: int,
    keep: Sequence[int],
    world_size: int,
) -> Candidates:
    """Draw samples of each condition of a batch and score them; all processes must call this.

    Args:
        rollouts: Draws and scores.
        route: How the model draws.
        batch: Whose rows seed the noise.
        condition: Its conditions.
        num: Samples of each.
        round_index: Number of the round, which seeds the noise too.
        keep: Indices into the route's grid; the last one is that of x_0.
        world_size: Number of processes.

    Raises:
        UsageError: All rewards failed.
    """
    candidates = condition.repeat(num)
    seeds = rollouts.seeds(batch, num, Stream.ROLLOUT, round_index)
    scoring = Scoring(rollouts)
    states = rollouts.draw(route, candidates, seeds, keep=keep, drawn=scoring.drawn)
    rewards, keys = scoring.finish(states[-1], candidates, seeds, world_size)
    reward = mean_of_all(rewards[rewards.isfinite()], world_size)
    if math.isnan(reward) and not rollouts.reward.asks:
        finite = any(gather(scoring.finite, world_size))
        raise all_failed(rollouts.reward.name, len(candidates) * world_size, finite=finite)
    failed = mean_of_all(1 - rewards.isfinite().float(), world_size)
    return Candidates(candidates, seeds, states, rewards, keys, reward, failed)
