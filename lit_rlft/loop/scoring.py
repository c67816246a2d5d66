"""Rewards of a round's samples, begun while further samples are drawn where workers score them."""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.answers import any_finite
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Combination, WeightedSum, offer
from lit_rlft.core.state import State, index
from lit_rlft.distributed import gather
from lit_rlft.loop.rollouts import Chunk, Rollouts, Scores
from lit_rlft.loop.side.rewards import begin, side_rewards

__all__ = ["Scoring"]


class Scoring:
    """Scores the samples of one round of training; those that cannot be scored have NaN.

    Args:
        rollouts: Decodes and scores.
        by_part: Score by the parts of a combined reward, each for itself.
        training: False scores the samples of an evaluation: a combined reward learns no scales from
            them.
        may_fail: False asks for all rewards.

    Attributes:
        finite: Whether any sample so far was scored, or could have been as it is finite.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        *,
        by_part: bool = False,
        training: bool = True,
        may_fail: bool = True,
    ) -> None:
        reward = rollouts.reward
        self.rollouts, self.by_part, self.may_fail = rollouts, by_part, may_fail
        learns = training and isinstance(reward, WeightedSum)
        self._normalises = learns and bool(reward.moments)
        sides = side_rewards(reward)
        self._ahead: float = sides[0].workers.ahead if sides else 0
        self._asks = training and reward.asks
        if self._asks:  # who decides sees all samples first
            self._ahead = math.inf
        self.finite = False
        self._num_begun = 0
        self._waiting: deque[tuple[Any, Condition]] = deque()
        self._rewards: list[Tensor] = []
        self._keys: list[Hashable] = []

    def drawn(self, chunk: Chunk, x_0: State) -> None:
        """Let workers begin with a chunk; without workers everything waits for `finish`.

        Args:
            chunk: The first one, or the one after the last one given.
            x_0: Its samples.
        """
        if self._ahead:
            self._begin(chunk, x_0)

    def finish(
        self, x_0: State, condition: Condition, seeds: Sequence[int], world_size: int
    ) -> Scores:
        """Return what all samples are worth; all processes must call this.

        Args:
            x_0: N samples.
            condition: N rows.
            seeds: N integers, which order the samples of all processes.
            world_size: Number of processes.

        Returns:
            Rewards [N], or by part [N, P], NaN where scoring failed.
        """
        for chunk in self.rollouts.chunks(condition, label="Scoring"):
            if chunk.rows.start >= self._num_begun:
                with chunk.part:
                    self._begin(chunk, index(x_0, chunk.rows))
        while self._waiting:
            self._take()
        rewards = torch.cat(self._rewards)
        if self._raw:
            rewards = self._scaled(rewards, seeds, world_size)
        return Scores(rewards, self._keys or None)

    @property
    def _raw(self) -> bool:
        """Whether parts are kept in their own units until all are known."""
        return self.by_part or self._normalises

    def _begin(self, chunk: Chunk, x_0: State) -> None:
        """Begin with a chunk; where memory runs out it has not begun."""
        before = (self._num_begun, list(self._waiting), len(self._rewards), len(self._keys))
        try:
            self._begin_once(chunk, x_0)
        except torch.OutOfMemoryError:
            self._num_begun, waiting, num_rewards, num_keys = before
            self._waiting = deque(waiting)
            del self._rewards[num_rewards:], self._keys[num_keys:]
            raise

    def _begin_once(self, chunk: Chunk, x_0: State) -> None:
        pipeline, condition = self.rollouts.pipeline, chunk.condition
        samples = pipeline.decode(x_0, condition)
        begin(self.rollouts.reward, "forward", samples, condition)
        self._keys.extend(pipeline.keys(samples, condition) or [])
        if self._asks:
            offer(self.rollouts.reward, samples, condition)
        self._num_begun = chunk.rows.stop
        self._waiting.append((samples, condition))
        while len(self._waiting) > self._ahead:
            self._take()

    def _take(self) -> None:
        """Wait for the rewards of the chunk that waits longest."""
        samples, condition = self._waiting.popleft()
        reward = self.rollouts.reward
        if not self._raw:
            own = self.rollouts.reward_of(samples, condition, may_fail=self.may_fail)
            self._append(own, samples)
            return
        assert isinstance(reward, Combination)
        self.rollouts.meter.current.reward_calls += len(condition)
        parts = reward.raw_parts(samples, condition)
        hear = self.rollouts.scored
        if hear is not None and not self._normalises:  # else there is no combination yet
            hear(samples, condition, reward.combine(reward.scaled(parts)))
        self._append(torch.stack([*parts.values()], dim=1), samples)

    def _append(self, rewards: Tensor, samples: Any) -> None:
        self._rewards.append(rewards)
        if not self.finite:
            known = rewards.isfinite().reshape(len(rewards), -1).all(dim=1)
            self.finite = bool(known.any()) or any_finite(samples)

    def _scaled(self, raw: Tensor, seeds: Sequence[int], world_size: int) -> Tensor:
        """Return parts [N, P] as they are combined, or their combination [N]."""
        reward = self.rollouts.reward
        assert isinstance(reward, Combination)
        names = list(reward.counted)
        if self._normalises:
            assert isinstance(reward, WeightedSum)
            own = list(zip(seeds, raw.double().tolist(), strict=True))
            # In the order of the seeds, which does not depend on the number of processes.
            everyone = sorted(chain(*gather(own, world_size)), key=lambda one: one[0])
            columns = torch.tensor([parts for _, parts in everyone], dtype=torch.float64).T
            reward.learn(dict(zip(names, columns, strict=True)))
        scaled = reward.scaled(dict(zip(names, raw.unbind(dim=1), strict=True)))
        return torch.stack([*scaled.values()], dim=1) if self.by_part else reward.combine(scaled)
