"""Rewards and metrics: functions of decoded samples and their conditions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lit_rlft.core.answers import (
    any_finite,
    apart,
    device_of,
    leads_to,
    numbers,
    tensors,
    unchanged,
)
from lit_rlft.core.checks import NO_SUPER, BadArgument, UsageError, finite, of_kind, require
from lit_rlft.core.contract import check_signatures
from lit_rlft.core.guard import Guard
from lit_rlft.core.moments import RunningMoments
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.settings import Recorded

__all__ = [
    "DIVERGENCE",
    "Combination",
    "LeftOut",
    "Metric",
    "Metrics",
    "Product",
    "Reward",
    "SetMetric",
    "WeightedSum",
    "all_failed",
    "check_born",
    "check_parts",
    "check_rewards",
    "offer",
    "rewards_of",
    "values_of",
]

DIVERGENCE = "kl"
"""What reports call the divergence from the reference, beside the values of rewards and metrics."""
A_REWARD = "a lit_rlft.Reward: a subclass, or the domain's FunctionReward around a function"
"""What to give where something else is no reward."""


_with_gradient: WeakSet[nn.Module] = WeakSet()
"""Rewards that had a gradient once: where they have none, none may be right."""


class Metric(Recorded, nn.Module, ABC):
    """A measurement of samples when a model is evaluated."""

    def check(self, pipeline: Pipeline) -> None:
        """Raise UsageError, before anything is sampled, if the pipeline's samples do not fit."""

    @abstractmethod
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return named values [B], NaN where a value does not apply to a sample."""

    def guards(self) -> dict[str, Guard]:
        """Return which of its values tell that the reward is exploited, by name."""
        return {}


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

    The standard errors of a test are the jackknife's: from the numbers when samples are left out,
    with all others of their row of the data where rows have several.

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
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float] | None:
        """Return the standard error of each number where a formula gives all; None otherwise.

        Args:
            features: Those of `compare`.
            other: Those of another model under the same conditions and noise. The errors are then
                those of the differences.
            rows: int64 [n], the row of the data of each sample; samples of one depend on each
                other. None where all are of different rows.
        """
        return None

    def beside(
        self,
        features: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        *,
        rows: Tensor | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Return numbers of the tuned model beside the reference, each with its standard error.

        Args:
            features: Those of `compare`, of the tuned model.
            reference: Those of the reference under the same conditions and noise.
            rows: As in `errors`.
        """
        return {}

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
        parts: What to measure; of the same name the second has a 2 after it, as "QED_2".
    """

    def __init__(self, parts: list[Metric] | None = None) -> None:
        super().__init__()
        of_kind(
            self,
            "parts",
            (list, tuple, nn.ModuleList, NoneType),
            "give a list: Metrics([...])",
            parts,
        )
        for i, part in enumerate(parts or ()):
            of_kind(self, f"parts[{i}]", Metric, "give a lit_rlft.Metric", part)
            check_born(part)
        self.parts = nn.ModuleList(parts or [])

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the values of every part."""
        values: dict[str, Tensor] = {}
        for part in self.parts:
            assert isinstance(part, Metric)
            values |= apart(values, values_of(part, samples, condition))
        return values

    def guards(self) -> dict[str, Guard]:
        """Return those of every part."""
        parts = [part.guards() for part in self.parts if isinstance(part, Metric)]
        return {name: guard for own in parts for name, guard in own.items()}


class Reward(Metric):
    """A score of decoded samples, [B], higher is better.

    Attributes:
        differentiable: Whether gradients flow from the reward to the samples.
        distinguishes: Whether samples that differ much never have the same reward: a run then
            stops at its start where the domain's probes do. False for rewards with few values.
        waits: Whether it waits for another program rather than computes: a thread is then as good
            as a process (`reward_workers`), and the run's start sends it no probes.
        asks: Whether a person decides. Such a reward is offered all samples of a round of training
            before it has to know any; without an answer it has NaN, also for a whole round. It has
            no worker, and nobody is asked in evaluations, where it is NaN.
    """

    differentiable: bool = False
    distinguishes: bool = False
    waits: bool = False
    asks: bool = False

    @property
    def name(self) -> str:
        """The key under which the reward is reported."""
        return type(self).__name__

    @abstractmethod
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each sample, [B]."""

    def offer(self, samples: Any, condition: Condition) -> None:
        """Take samples of a round of training that `forward` will be asked about.

        Only rewards that ask are offered samples: whole groups of candidates in order, which one
        offer may end in the middle of.
        """

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward under its name; subclasses may add details."""
        return {self.name: self(samples, condition)}

    def guards(self) -> dict[str, Guard]:
        """Return itself: a reward among the metrics is one that is not trained on."""
        return {self.name: Guard()}


class Combination(Reward):
    """Several rewards as one number; differentiable where every part that counts is.

    Args:
        rewards: The parts by name.
        ranges: Two values of a part by its name, which become 0 and 1; the first one of a cost is
            the larger. Published ranges bring parts of different units together.
        limits: Least and largest value of a part that count, by its name, in the part's own units;
            None is no limit. A part that has reached its limit cannot make up for another one.
        held_out: Names of parts that are measured in evaluations and never trained on. When the
            reward rises and they fall, the model games the reward.

    Raises:
        BadArgument: A name is not that of a part, no part counts, or a pair is not in order.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        ranges: dict[str, tuple[float, float]] | None = None,
        limits: dict[str, tuple[float | None, float | None]] | None = None,
        held_out: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._check_rewards(rewards)
        try:
            self.rewards = nn.ModuleDict(rewards)
        except (KeyError, TypeError) as error:
            problem = f"has a name that torch cannot take ({error.args[0]}); give another one"
            raise BadArgument(self, "rewards", problem) from error
        self.ranges, self.limits = dict(ranges or {}), dict(limits or {})
        self.held_out = tuple(held_out or ())
        for argument in ("ranges", "limits", "held_out"):
            self._check_names(argument)
        self._check_pairs("ranges", lambda a, b: None not in (a, b) and a != b, "different numbers")
        self._check_pairs("limits", lambda a, b: None in (a, b) or a < b, "a smaller number first")
        normalised = [n for n, r in rewards.items() if isinstance(r, WeightedSum) and r.moments]
        rule = f"without normalize in its parts {normalised}: only the whole reward can have it"
        require(not normalised, self, "rewards", rule)
        if len(set(self.held_out)) == len(rewards):
            raise BadArgument(self, "held_out", "must leave a reward to train on")
        self.differentiable = all(reward.differentiable for reward in self.counted.values())
        self.asks = any(reward.asks for reward in self.counted.values())

    @property
    def counted(self) -> dict[str, Reward]:
        """The parts that are not held out, by name."""
        return {
            name: part
            for name, part in self.rewards.items()
            if isinstance(part, Reward) and name not in self.held_out
        }

    def raw_parts(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return each part that counts, [B], in its own units, NaN where it failed."""
        return {
            name: rewards_of(reward, samples, condition, may_fail=True)
            for name, reward in self.counted.items()
        }

    def scaled(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parts by name, [B], within their limits and in units of their ranges."""
        scaled = {}
        for name, part in self.limited(parts).items():
            start, end = self.ranges.get(name, (0.0, 1.0))
            scaled[name] = (part - start) / (end - start)
        return scaled

    def limited(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parts by name, [B], within their limits, in their own units."""
        found = {}
        for name, part in parts.items():
            low, high = self.limits.get(name, (None, None))
            found[name] = part if low is None and high is None else part.clamp(low, high)
        return found

    def parts(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return each part that counts, [B], as they are combined."""
        return self.scaled(self.raw_parts(samples, condition))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return self.combine(self.parts(samples, condition))

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the combination, each part, and the details of parts under "<part>/...".

        All are on the samples' device: some parts are computed there, others on the CPU.
        """
        values: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            assert isinstance(reward, Reward)
            for key, value in values_of(reward, samples, condition).items():
                detail = key.removeprefix(f"{reward.name}/")
                known = value.to(device_of(samples, value.device))
                values[name if key == reward.name else f"{name}/{detail}"] = known
        if self.name in values:  # one that was not known yet when the parts were given
            self._check_part(self.name)
        return {self.name: self.combined(values), **values}

    def combined(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the combination [B] of the parts among values by name, in their own units."""
        return self.combine(self.scaled({name: values[name] for name in self.counted}))

    @abstractmethod
    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the combination [B] of what `parts` returns."""

    def _check_rewards(self, rewards: Any) -> None:
        remedy = "give a dict of rewards by name"
        of_kind(self, "rewards", (Mapping, nn.ModuleDict), remedy, rewards)
        if not rewards:
            raise BadArgument(self, "rewards", "must name at least one reward")
        for name, reward in rewards.items():
            of_kind(self, f"rewards[{name!r}]", Reward, f"give {A_REWARD}", reward)
            check_born(reward)
            self._check_part(name)
            if within := [other for other in rewards if str(name).startswith(f"{other}/")]:
                problem = f"has {name!r}, which reads as a detail of its part {within[0]!r}"
                raise BadArgument(self, "rewards", f"{problem}; give it another name")

    def _check_part(self, name: str) -> None:
        """Raise BadArgument for a part that reports would mistake for something else."""
        others = {
            getattr(self, "name", None): f"the {type(self).__name__} itself",
            DIVERGENCE: "the divergence from the reference",
        }
        if name in others:
            problem = f"has a part called {name!r}, as reports call {others[name]}"
            raise BadArgument(self, "rewards", f"{problem}; give it another name")

    def _check_names(self, argument: str) -> None:
        if unknown := sorted(set(getattr(self, argument)) - set(self.rewards)):
            problem = f"names {unknown}, but rewards has {sorted(self.rewards)}"
            raise BadArgument(self, argument, problem)

    def _check_pairs(self, argument: str, right: Callable[[Any, Any], bool], words: str) -> None:
        finite(self, argument)
        for name, pair in getattr(self, argument).items():
            known = isinstance(pair, list | tuple) and len(pair) == 2 and right(*pair)
            require(known, self, argument, f"pairs, {words}, got {name}: {pair}")


class WeightedSum(Combination):
    """A weighted sum of rewards, r = sum_i w_i r_i.

    Args:
        rewards: The parts by name.
        weights: Their weights; 1 where absent. Use a negative weight for a cost.
        ranges: As in `Combination`.
        limits: As in `Combination`.
        held_out: As in `Combination`.
        normalize: Bring parts without a range to mean 0 and deviation 1 over all samples that the
            run has trained on, this round's included. Weights then say how much each part counts
            in any unit. The unit changes during a run, most in its first rounds.

    Attributes:
        moments: Mean and deviation of each part that is normalised, within its limits.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        weights: dict[str, float] | None = None,
        ranges: dict[str, tuple[float, float]] | None = None,
        limits: dict[str, tuple[float | None, float | None]] | None = None,
        held_out: list[str] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(rewards, ranges, limits, held_out)
        self.normalize = normalize
        without = [name for name in self.counted if name not in self.ranges] if normalize else []
        self.moments = {name: RunningMoments() for name in without}
        self.weights: Mapping[str, float] = dict(weights or {})
        self._check_names("weights")
        self.weights = {name: self.weights.get(name, 1.0) for name in rewards}
        finite(self, "weights")

    def scaled(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parts as in `Combination`; those that are normalised, by the moments so far."""
        scaled = super().scaled(parts)
        for name in self.moments.keys() & scaled.keys():
            scaled[name] = self.moments[name].standardised(scaled[name])
        return scaled

    def learn(self, parts: Mapping[str, Tensor]) -> None:
        """Take the parts of further samples into the moments.

        Args:
            parts: By name, [n] in their own units, the same on every process.
        """
        for name, part in self.limited(parts).items():
            if name in self.moments:
                self.moments[name].update(part)

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(dim=0)


class Product(Combination):
    """A product of rewards, for parts of which none can do without the others.

    Values below 0 count as 0: two of them would have a product above 0. Give ranges to parts that
    can be negative. Where a part is 0, the gradients of all others are.
    """

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([part.clamp(min=0) for part in parts.values()]).prod(dim=0)


def rewards_of(
    reward: Reward, samples: Any, condition: Condition, *, may_fail: bool = False
) -> Tensor:
    """Return a reward's values of samples, [B], as `check_rewards` does, on the samples' device.

    Raises:
        UsageError: They are not as a reward returns them, the samples were changed in place, or a
            differentiable reward has no gradient.
    """
    with unchanged(samples, reward.name):
        answer = reward(samples, condition)
    values = check_rewards(reward, answer, len(condition), may_fail=may_fail, samples=samples)
    asked = torch.is_grad_enabled() and reward.differentiable
    if asked and any(one.requires_grad for one in tensors(samples)):
        _check_gradient(reward, values, leads_to(answer, samples))
    return values.to(device_of(samples, values.device))


def _check_gradient(reward: Reward, values: Tensor, has_gradient: bool) -> None:
    """Raise UsageError where values differ between samples and have no gradient to them.

    Values that are all the same may be right: a reward can be constant where nothing applies. In a
    sum a part without a gradient would be left out in silence.
    """
    if has_gradient:
        _with_gradient.add(reward)
    if reward in _with_gradient:
        return  # before values are looked at, for which an accelerator would be waited for
    known = values[values.isfinite()]
    if (known != known[:1]).any():
        raise UsageError(
            f"{reward.name} has differentiable = True, but its values have no gradient; look for "
            "torch.no_grad, detach, .item(), numpy or a comparison in its forward, or set "
            "differentiable to False and use configs/algorithms/p_graft.yaml, which needs none"
        )


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
    if isinstance(metric, Reward) and name not in values:
        raise UsageError(
            f"{name}.evaluate() lacks {name!r}; return the reward under its name, beside details"
        )
    return {
        str(key): numbers(f"{name}.evaluate()[{key!r}]", value, len(condition), "metric")
        for key, value in values.items()
    }


def check_rewards(
    reward: Reward,
    values: Any,
    num_samples: int,
    *,
    may_fail: bool = False,
    samples: Any = None,
) -> Tensor:
    """Return rewards as float32 [B]; float64 rewards stay float64.

    Bool, integers and half precision are converted. Where no gradients are computed, the rewards
    carry none. Where they are computed, on an accelerator, values are not looked at: that would
    wait for it in the middle of an update. `SelfCheck` looks at them once the gradients are there.

    Args:
        reward: Its name is told.
        values: What it returned.
        num_samples: Of how many samples.
        may_fail: Whether they may be missing.
        samples: What it scored, where known: it is not to blame where they are not finite.

    Returns:
        Finite numbers, and NaN where one is not, if rewards `may_fail`.

    Raises:
        UsageError: They are no real tensor [B], or a value is NaN, infinite or too large for
            float32 although none `may_fail`; the sentence names the reward.
    """
    values = numbers(reward.name, values, num_samples, "reward")
    if not torch.is_grad_enabled():
        values = values.detach()
    elif not values.is_cpu:
        return values
    finite = values.float().isfinite()
    if finite.all():
        return values
    if may_fail:
        return values.where(finite, torch.nan)
    if not finite.any() and not any_finite(samples):
        raise all_failed(reward.name, num_samples, finite=False)
    known = "NaN" if values.isnan().any() else f"{float(values[~finite][0]):g}"
    raise UsageError(
        f"{reward.name} returned {known} for {int((~finite).sum())} of {num_samples} samples; "
        "give failed samples a finite low reward"
    )


def check_born(*parts: object) -> None:
    """Raise UsageError for a part whose `__init__` leaves out that of its base.

    Torch and Lightning would name one of their own attributes, and no file of the user.
    """
    for part in parts:
        if isinstance(part, nn.Module) and "_modules" not in vars(part):
            raise UsageError(NO_SUPER.format(type(part).__name__))


def check_parts(metric: Metric, pipeline: Pipeline) -> None:
    """Freeze a metric or reward and all that it is made of, and check each with a pipeline.

    Raises:
        UsageError: The pipeline's samples do not fit, or a method cannot be called.
    """
    for part in metric.modules():
        if isinstance(part, Metric):
            check_signatures(part, Metric, SetMetric, Reward)
            part.requires_grad_(False).check(pipeline)


def offer(reward: Reward, samples: Any, condition: Condition) -> None:
    """Offer samples to all parts of a reward that ask a person."""
    if isinstance(reward, Combination):
        for part in reward.counted.values():
            offer(part, samples, condition)
    elif reward.asks:
        reward.offer(samples, condition)


def all_failed(source: str, num_samples: int, *, finite: bool = True) -> UsageError:
    """Return the error of a reward that scored none of some samples.

    Args:
        source: Name of the reward.
        num_samples: Number of the samples.
        finite: Whether any of them has finite numbers alone, so that the reward is to blame.
    """
    if not finite:
        return UsageError(
            f"all {num_samples} samples hold numbers that are not finite, so {source} has nothing "
            "to score; look at the pipeline that drew them: its denoiser's weights, its process "
            "and schedule, and the precision (trainer.precision)"
        )
    return UsageError(
        f"{source} failed for all {num_samples} samples: it returned no finite number; fix the "
        "reward first"
    )
