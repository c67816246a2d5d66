"""Rewards and metrics: functions of decoded samples and their conditions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition, Pipeline

__all__ = [
    "LeftOut",
    "Metric",
    "Metrics",
    "Reward",
    "SetMetric",
    "WeightedSum",
    "check_rewards",
]


class Metric(nn.Module, ABC):
    """A measurement of samples when a model is evaluated."""

    def check(self, pipeline: Pipeline) -> None:
        """Raise UsageError, before anything is sampled, if the pipeline's samples do not fit."""

    @abstractmethod
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return named values [B], NaN where a value does not apply to a sample."""


class LeftOut(NamedTuple):
    """A number of n samples when some of them are left out, float64.

    Attributes:
        each: Without each of the samples, [n].
        both: Without both of each of P pairs, [P].
    """

    each: Tensor
    both: Tensor


class SetMetric(Metric):
    """A measurement of all samples of an evaluation together, such as FID.

    The standard errors of a test are the jackknife's: from the numbers when samples are left out.

    Attributes:
        num_draws: Groups of samples that are left out in turn for the errors of numbers that
            `left_out` does not give; their share of the error's own error is 1 / sqrt(2 groups).
            0 leaves all errors out, as NaN.
    """

    num_draws: int = 20

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return nothing: there are no values of single samples."""
        return {}

    @abstractmethod
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the features of each sample that `compare` needs, [B, ...] each."""

    @abstractmethod
    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return named numbers of n samples.

        Args:
            features: [n, ...] each, of all batches and processes, on the CPU.
        """

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return those numbers that are quick to have without each sample and without some pairs.

        Args:
            features: [n, ...] each, n at least 4.
            pairs: Places of the samples of each pair, [P, 2].
        """
        return {}

    def compare_draw(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return `compare` when a group is left out, without the numbers that `left_out` gives."""
        return self.compare(features)


class Metrics(Metric):
    """Several measurements taken together.

    Args:
        parts: What to measure; their names must differ.
    """

    def __init__(self, parts: list[Metric] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts or [])

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the values of every part."""
        values: dict[str, Tensor] = {}
        for part in self.parts:
            assert isinstance(part, Metric)
            values |= part.evaluate(samples, condition)
        return values


class Reward(Metric):
    """A score of decoded samples, [B], higher is better.

    Attributes:
        differentiable: Whether gradients flow from the reward to the samples.
    """

    differentiable: bool = False

    @property
    def name(self) -> str:
        """The key under which the reward is reported."""
        return type(self).__name__

    @abstractmethod
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each sample, [B]."""

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward under its name; subclasses may add details."""
        return {self.name: self(samples, condition)}


class WeightedSum(Reward):
    """A weighted sum of rewards, r = sum_i w_i r_i; differentiable where every part is.

    Args:
        rewards: The parts by name.
        weights: Their weights; 1 where absent. Use a negative weight for a cost.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if not rewards:
            raise BadArgument(self, "rewards", "must name at least one reward")
        unknown = sorted(set(weights or {}) - set(rewards))
        if unknown:
            problem = f"names {unknown}, but rewards has {sorted(rewards)}"
            raise BadArgument(self, "weights", problem)
        self.rewards = nn.ModuleDict(rewards)
        self.weights: Mapping[str, float] = {n: (weights or {}).get(n, 1.0) for n in rewards}
        self.differentiable = all(reward.differentiable for reward in rewards.values())

    def parts(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return each part's unweighted reward, [B]."""
        return {name: reward(samples, condition) for name, reward in self.rewards.items()}

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return self._total(self.parts(samples, condition))

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the sum, each part, and the details of parts under "<part>/..."."""
        values: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            assert isinstance(reward, Reward)
            for key, value in reward.evaluate(samples, condition).items():
                detail = key.removeprefix(reward.name).removeprefix("/")
                values[f"{name}/{detail}" if detail else name] = value
        return {self.name: self._total({name: values[name] for name in self.rewards}), **values}

    def _total(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(dim=0)


def check_rewards(
    reward: Reward, values: Any, num_samples: int, *, may_fail: bool = False
) -> Tensor:
    """Return rewards as float32 [B]; float64 rewards stay float64.

    Raises:
        UsageError: They are no tensor [B], or a value is NaN although none `may_fail`; the
            sentence names the reward.
    """
    if not isinstance(values, Tensor):
        raise UsageError(
            f"{reward.name} returned a {type(values).__name__}; a reward returns a tensor with one "
            f"number per sample, shape ({num_samples},)"
        )
    if values.shape != (num_samples,):
        raise UsageError(
            f"{reward.name} returned shape {tuple(values.shape)} for {num_samples} samples; "
            f"a reward returns one number per sample, shape ({num_samples},)"
        )
    if not may_fail and values.isnan().any():
        raise UsageError(
            f"{reward.name} returned NaN for {int(values.isnan().sum())} of {num_samples} samples; "
            "give failed samples a finite low reward"
        )
    return values if values.dtype == torch.float64 else values.float()
