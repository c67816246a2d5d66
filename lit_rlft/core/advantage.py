r"""Advantages: how much better a sample's reward is than that of its peers.

.. math::
    A_i = \frac{r_i - \mathrm{mean}(peers)}{\mathrm{std}(peers) + 10^{-6}},

clipped on request, with the population's standard deviation. The rules differ in who the peers are.
Everything is float64 for any type of rewards. A reward that is not finite marks a sample
that could not be scored: it is nobody's peer and its advantage is 0. Where all peers have the same
reward, the advantage is 0 too.

References:
    Training Diffusion Models with Reinforcement Learning (Black et al., 2023; running statistics),
    https://arxiv.org/abs/2305.13301
    DeepSeekMath (Shao et al., 2024; groups), https://arxiv.org/abs/2402.03300
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError, at_least

__all__ = [
    "Advantage",
    "BatchAdvantage",
    "GroupAdvantage",
    "RunningAdvantage",
    "constant_groups",
]

_EPSILON = 1e-6


class Advantage(ABC):
    """A rule that picks each sample's peers: the rewards that its own is compared with."""

    def check(self, num_candidates: int) -> None:
        """Raise UsageError where the rule cannot work with this many candidates."""

    @abstractmethod
    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        """Return each group's peers: the finite rewards (1-D) that its own are compared with."""

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        """Return advantages, float64 [G, M].

        Args:
            rewards: [G, M] of any type, a row per group: the candidates of one condition. All
                processes must pass those of all processes, in the same order.
            conditions: G names, equal for equal conditions.
            clip: Advantages are clamped to [-clip, clip]; None leaves them alone.
        """
        rewards = rewards.double()
        moments = [_moments(peers) for peers in self.peers(rewards, conditions)]
        mean, std = torch.tensor(moments, dtype=torch.float64).unsqueeze(-1).unbind(dim=1)
        advantages = (rewards - mean) / (std + _EPSILON)
        advantages = advantages.where(rewards.isfinite() & (std > 0), 0)
        return advantages if clip is None else advantages.clamp(-clip, clip)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the state that a resumed run needs: lists of floats by condition."""
        return {}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore what `state_dict` returned."""


class GroupAdvantage(Advantage):
    """Peers are the candidates of the same group, as in group-relative policy optimisation."""

    def check(self, num_candidates: int) -> None:
        if num_candidates < 2:
            raise UsageError(
                f"num_candidates is {num_candidates}, but a group of one has no peers; raise it to "
                "2 or more, or set advantage to RunningAdvantage or BatchAdvantage"
            )

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return [_finite(group) for group in rewards]


class BatchAdvantage(Advantage):
    """Peers are all samples of the round."""

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return [_finite(rewards.flatten())] * len(rewards)


class RunningAdvantage(BatchAdvantage):
    """Peers are the latest samples of the same condition, those of this round included.

    A condition with few samples so far is compared with all samples of the round instead.

    Args:
        buffer_size: Rewards remembered per condition; 16 to 32 are usual.
        min_count: Rewards that a condition needs before its own statistics are used.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        at_least(2, self, buffer_size=buffer_size, min_count=min_count)
        if min_count > buffer_size:
            rule = f"at most buffer_size ({buffer_size}), got {min_count}"
            raise BadArgument(self, "min_count", f"must be {rule}")
        self.buffer_size, self.min_count = buffer_size, min_count
        self._buffers: dict[str, deque[float]] = {}

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        for group, condition in zip(rewards, conditions, strict=True):
            self._buffer(condition).extend(_finite(group).tolist())
        batch = super().peers(rewards, conditions)
        for i, condition in enumerate(conditions):
            buffer = self._buffer(condition)
            if len(buffer) >= self.min_count:
                batch[i] = torch.tensor(list(buffer), dtype=torch.float64)
        return batch

    def state_dict(self) -> dict[str, list[float]]:
        return {condition: list(buffer) for condition, buffer in self._buffers.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._buffers = {}
        for condition, rewards in state.items():
            self._buffer(condition).extend(rewards)

    def _buffer(self, condition: str) -> deque[float]:
        return self._buffers.setdefault(condition, deque(maxlen=self.buffer_size))


def constant_groups(rewards: Tensor) -> float:
    """Return the share of groups [G, M] whose candidates all have the same reward.

    They teach nothing under group advantages. NaN where no group has two finite rewards.
    """
    groups = [_finite(group) for group in rewards]
    known = [bool((group == group[0]).all()) for group in groups if len(group) > 1]
    return sum(known) / len(known) if known else float("nan")


def _finite(rewards: Tensor) -> Tensor:
    return rewards[rewards.isfinite()]


def _moments(values: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation; the latter is exactly 0 where all values are equal."""
    if not len(values) or bool((values == values[0]).all()):
        return float(values[0]) if len(values) else 0.0, 0.0
    return float(values.mean()), float(values.std(correction=0))
