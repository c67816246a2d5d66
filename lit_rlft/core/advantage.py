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
    Flow-GRPO (Liu et al., 2025; groups with the round's std), https://arxiv.org/abs/2505.05470
    Back to Basics (Ahmadian et al., 2024; RLOO), https://arxiv.org/abs/2402.14740
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError, at_least, one_of
from lit_rlft.core.settings import Recorded

__all__ = [
    "Advantage",
    "BatchAdvantage",
    "GroupAdvantage",
    "LeaveOneOutAdvantage",
    "RunningAdvantage",
    "constant_groups",
]

Spread = Literal["group", "round"]

_EPSILON = 1e-6


class Advantage(Recorded, ABC):
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
        peers = self.peers(rewards, conditions)
        known = {id(own): _moments(own) for own in {id(own): own for own in peers}.values()}
        moments = [known[id(own)] for own in peers]  # many groups may share their peers
        mean, std = torch.tensor(moments, dtype=torch.float64).unsqueeze(-1).unbind(dim=1)
        advantages = (rewards - mean) / (self.unit(rewards, std) + _EPSILON)
        advantages = advantages.where(rewards.isfinite() & (std > 0), 0)
        return advantages if clip is None else advantages.clamp(-clip, clip)

    def unit(self, rewards: Tensor, std: Tensor) -> Tensor:
        """Return what differences from the mean are divided by: the peers' standard deviation.

        Args:
            rewards: Float64 [G, M].
            std: Of each group's peers, [G, 1].
        """
        return std

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs, tensors by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class GroupAdvantage(Advantage):
    """Peers are the candidates of the same group, as in group-relative policy optimisation.

    Args:
        std: Divide by the standard deviation of the own "group", by which small differences count
            as much as large ones; or by that of all rewards of the "round" (Flow-GRPO), which
            leaves groups that hardly differ their small advantages.
    """

    def __init__(self, std: Spread = "group") -> None:
        one_of(self, "std", get_args(Spread), std)
        self.std: Spread = std

    def check(self, num_candidates: int) -> None:
        if num_candidates < 2:
            raise UsageError(
                f"num_candidates is {num_candidates}, but a group of one has no peers; raise it to "
                "2 or more, or set advantage to RunningAdvantage or BatchAdvantage"
            )

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return [_finite(group) for group in rewards]

    def unit(self, rewards: Tensor, std: Tensor) -> Tensor:
        if self.std == "group":
            return std
        return torch.full_like(std, _moments(_finite(rewards.flatten()))[1])


class LeaveOneOutAdvantage(GroupAdvantage):
    r"""The reward less the mean of the *others* of its group (RLOO), in the reward's own unit.

    .. math::
        A_i = r_i - \frac{1}{M - 1} \sum_{j \ne i} r_j = \frac{M}{M - 1} (r_i - \bar r).

    No sample is part of its own baseline: the policy gradient is that of the expected reward
    itself. It is not divided by a standard deviation: scale the reward or `advantage_clip`.
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        rewards = rewards.double()
        known = rewards.isfinite()
        num = known.sum(dim=1, keepdim=True)
        # Differences to one of them, so that equal rewards leave no rounding.
        apart = rewards - rewards.where(known, -torch.inf).amax(dim=1, keepdim=True)
        apart = apart.where(known, 0)
        others = (apart.sum(dim=1, keepdim=True) - apart) / (num - 1).clamp(min=1)
        advantages = (apart - others).where(known & (num > 1), 0)
        return advantages if clip is None else advantages.clamp(-clip, clip)


class BatchAdvantage(Advantage):
    """Peers are all samples of the round."""

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return [_finite(rewards.flatten())] * len(rewards)


class RunningAdvantage(BatchAdvantage):
    """Peers are the latest samples of the same condition, those of this round included.

    A condition with few samples so far is compared with all samples of the round instead. So is
    one that was forgotten: it starts again like a new one.

    Args:
        buffer_size: Rewards remembered per condition; 16 to 32 are usual.
        min_count: Rewards that a condition needs before its own statistics are used.
        max_conditions: Conditions remembered; after a round those seen longest ago are forgotten.
            They take 8 * `buffer_size` bytes each and some 150 more, about 40 MB in all by default.
    """

    def __init__(
        self, buffer_size: int = 32, min_count: int = 16, max_conditions: int = 100_000
    ) -> None:
        at_least(2, self, buffer_size=buffer_size, min_count=min_count)
        at_least(1, self, max_conditions=max_conditions)
        if min_count > buffer_size:
            rule = f"at most buffer_size ({buffer_size}), got {min_count}"
            raise BadArgument(self, "min_count", f"must be {rule}")
        self.buffer_size, self.min_count = buffer_size, min_count
        self.max_conditions = max_conditions
        self._slots: dict[int, int] = {}
        """From conditions, those seen longest ago first, to rows of the buffers."""
        self._free: list[int] = []
        self._rewards = torch.empty(0, buffer_size, dtype=torch.float64)
        self._counts = torch.empty(0, dtype=torch.int64)

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        groups: dict[int, list[Tensor]] = {}
        keys = [_key(condition) for condition in conditions]
        for group, key in zip(rewards, keys, strict=True):
            groups[key] = groups.pop(key, [])  # conditions seen last come last
            groups[key].append(group)
        for key, own in groups.items():
            self._remember(key, _finite(torch.cat(own)))
        buffers = {key: self._buffer(self._slots[key]) for key in groups}
        known = {key: own.clone() for key, own in buffers.items() if len(own) >= self.min_count}
        everyone = super().peers(rewards, conditions)
        while len(self._slots) > self.max_conditions:
            self._free.append(self._slots.pop(next(iter(self._slots))))
        return [known.get(key, own) for key, own in zip(keys, everyone, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the conditions' digests [C], their numbers of rewards [C], and all rewards [R].

        Rewards are float32 where that changes none of them, float64 otherwise.
        """
        slots = torch.tensor([*self._slots.values()], dtype=torch.int64)
        counts = self._counts[slots]
        rewards = self._rewards[slots][self._filled(counts)]
        single = rewards.float()
        return {
            "conditions": torch.tensor([*self._slots], dtype=torch.int64),
            "counts": counts,
            "rewards": single if torch.equal(single.double(), rewards) else rewards,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or lists by condition, as older checkpoints."""
        if not isinstance(state.get("counts"), Tensor):
            state = _from_lists(state)
        counts, num = state["counts"], len(state["counts"])
        # The latest of each condition, where there are more than fit.
        surplus = (counts - self.buffer_size).clamp(min=0)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = torch.arange(len(first)) - first
        rewards = state["rewards"].double()[places >= surplus.repeat_interleave(counts)]
        self._counts = counts - surplus
        self._rewards = torch.zeros(num, self.buffer_size, dtype=torch.float64)
        self._rewards[self._filled(self._counts)] = rewards
        self._slots = {key: slot for slot, key in enumerate(state["conditions"].tolist())}
        self._free = []

    def _remember(self, key: int, rewards: Tensor) -> None:
        """Append rewards to those of a condition, now the one seen last; drop its oldest."""
        slot = self._slots.pop(key, None)
        if slot is None:
            slot = self._new_slot()
        self._slots[key] = slot
        latest = torch.cat([self._buffer(slot), rewards])[-self.buffer_size :]
        self._rewards[slot, : len(latest)] = latest
        self._counts[slot] = len(latest)

    def _new_slot(self) -> int:
        if not self._free:
            num = len(self._counts)
            more = max(64, min(num // 2, self.max_conditions - num))
            self._free = list(range(num, num + more))
            room = self._rewards.new_zeros(more, self.buffer_size)
            self._rewards = torch.cat([self._rewards, room])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
        slot = self._free.pop()
        self._counts[slot] = 0
        return slot

    def _buffer(self, slot: int) -> Tensor:
        """Return the rewards of a condition, the oldest first."""
        return self._rewards[slot, : int(self._counts[slot])]

    def _filled(self, counts: Tensor) -> Tensor:
        return torch.arange(self.buffer_size) < counts.unsqueeze(1)


def _key(condition: str) -> int:
    """Return a digest of a condition's name, which 64-bit integers can hold."""
    digest = hashlib.blake2b(condition.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _from_lists(rewards: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    flat = [reward for own in rewards.values() for reward in own]
    return {
        "conditions": torch.tensor([_key(name) for name in rewards], dtype=torch.int64),
        "counts": torch.tensor([len(own) for own in rewards.values()], dtype=torch.int64),
        "rewards": torch.tensor(flat, dtype=torch.float64),
    }


def constant_groups(rewards: Tensor) -> float:
    """Return the share of groups [G, M] whose candidates all have the same reward.

    They teach nothing under group advantages. NaN where no group has two finite rewards.
    """
    rewards, finite = rewards.double(), rewards.isfinite()
    lowest = rewards.where(finite, math.inf).amin(dim=1)
    highest = rewards.where(finite, -math.inf).amax(dim=1)
    known = finite.sum(dim=1) > 1
    constant = int(((lowest == highest) & known).sum())
    return constant / int(known.sum()) if known.any() else float("nan")


def _finite(rewards: Tensor) -> Tensor:
    return rewards[rewards.isfinite()]


def _moments(values: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation; the latter is exactly 0 where all values are equal."""
    if not len(values) or bool((values == values[0]).all()):
        return float(values[0]) if len(values) else 0.0, 0.0
    return float(values.mean()), float(values.std(correction=0))
