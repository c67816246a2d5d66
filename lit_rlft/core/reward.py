"""Rewards and metrics: functions of decoded samples and their conditions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rlft.core.answers import numbers, tensors, unchanged
from lit_rlft.core.checks import BadArgument, UsageError, finite
from lit_rlft.core.pipeline import Condition, Pipeline

__all__ = [
    "LeftOut",
    "Metric",
    "Metrics",
    "Reward",
    "SetMetric",
    "WeightedSum",
    "check_rewards",
    "rewards_of",
    "values_of",
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
            neither `errors` nor `left_out` gives; their share of the error's own error is
            1 / sqrt(2 groups). 0 leaves all errors out, as NaN.
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

    def errors(
        self, features: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None
    ) -> dict[str, float] | None:
        """Return the standard error of each number where a formula gives all; None otherwise.

        Args:
            features: Those of `compare`.
            other: Those of another model under the same conditions and noise. The errors are then
                those of the differences.
        """
        return None

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
            values |= values_of(part, samples, condition)
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
        finite(self, "weights")
        self.differentiable = all(reward.differentiable for reward in rewards.values())

    def parts(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return each part's unweighted reward, [B]."""
        return {
            name: rewards_of(reward, samples, condition, may_fail=True)
            for name, reward in self.rewards.items()
            if isinstance(reward, Reward)
        }

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return self._total(self.parts(samples, condition))

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the sum, each part, and the details of parts under "<part>/..."."""
        values: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            assert isinstance(reward, Reward)
            for key, value in values_of(reward, samples, condition).items():
                detail = key.removeprefix(reward.name).removeprefix("/")
                values[f"{name}/{detail}" if detail else name] = value
        return {self.name: self._total({name: values[name] for name in self.rewards}), **values}

    def _total(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(dim=0)


def rewards_of(
    reward: Reward, samples: Any, condition: Condition, *, may_fail: bool = False
) -> Tensor:
    """Return a reward's values of samples, [B], as `check_rewards` does, on the samples' device.

    Raises:
        UsageError: They are not as a reward returns them, or the samples were changed in place.
    """
    with unchanged(samples, reward.name):
        values = reward(samples, condition)
    values = check_rewards(reward, values, len(condition), may_fail=may_fail)
    device = next((one.device for one in tensors(samples)), values.device)
    return values.to(device)


def values_of(metric: Metric, samples: Any, condition: Condition) -> dict[str, Tensor]:
    """Return a metric's named values of samples, [B] each, NaN where a value does not apply.

    Raises:
        UsageError: It returns something else, or changes the samples in place.
    """
    name = metric.name if isinstance(metric, Reward) else type(metric).__name__
    with unchanged(samples, name):
        values = metric.evaluate(samples, condition)
    if not isinstance(values, dict):
        raise UsageError(
            f"{name}.evaluate returned a {type(values).__name__}; return a dict of named tensors "
            f"with one number per sample, shape ({len(condition)},)"
        )
    return {
        str(key): numbers(f"{name}.evaluate()[{key!r}]", value, len(condition), "metric")
        for key, value in values.items()
    }


def check_rewards(
    reward: Reward, values: Any, num_samples: int, *, may_fail: bool = False
) -> Tensor:
    """Return rewards as float32 [B]; float64 rewards stay float64.

    Bool, integers and half precision are converted. Where no gradients are computed, the rewards
    carry none.

    Returns:
        Finite numbers, and NaN where one is not, if rewards `may_fail`.

    Raises:
        UsageError: They are no real tensor [B], or a value is NaN, infinite or too large for
            float32 although none `may_fail`; the sentence names the reward.
    """
    values = numbers(reward.name, values, num_samples, "reward")
    if not torch.is_grad_enabled():
        values = values.detach()
    finite = values.float().isfinite()
    if finite.all():
        return values
    if may_fail:
        return values.where(finite, torch.nan)
    known = "NaN" if values.isnan().any() else f"{float(values[~finite][0]):g}"
    raise UsageError(
        f"{reward.name} returned {known} for {int((~finite).sum())} of {num_samples} samples; "
        "give failed samples a finite low reward"
    )
