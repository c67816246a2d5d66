"""Which steps of a differentiable walk carry gradient: DRTune and its family in a few lines each.

Steps are counted as in the papers: T is the first, on pure noise, and 1 the last. A plan is drawn
for every update and shared by its samples, so that a step runs either with a graph or without.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_rlft.core.checks import BadArgument, UsageError, at_least
from lit_rlft.core.settings import Recorded
from lit_rlft.core.state import described

__all__ = [
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "GradientMethod",
    "GradientPlan",
    "ReFL",
    "check_plan",
]


@dataclass(frozen=True)
class GradientPlan:
    """Where one walk has a graph and where it ends.

    Attributes:
        trained: Steps whose prediction carries gradient to the weights.
        stop: Step whose prediction is turned into x_0 at once; None walks all steps.
        num_copies: Re-noised copies of x_0 on which the last step is done again, with gradient.
    """

    trained: frozenset[int]
    stop: int | None = None
    num_copies: int = 0

    def before(self, num_steps: int) -> "GradientPlan":
        """Return the same plan for the steps that come before so many last ones."""
        trained = frozenset(step + num_steps for step in self.trained)
        stop = None if self.stop is None else self.stop + num_steps
        return replace(self, trained=trained, stop=stop)


class GradientMethod(Recorded, ABC):
    """A rule for the steps that carry gradient.

    Attributes:
        detach_input: Whether the denoiser's input is detached in trained steps: gradients then
            reach a step through the linear part of the sampler only, not through the denoiser's
            Jacobians of the later ones.
    """

    detach_input: bool = False

    @abstractmethod
    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        """Draw the plan of one update for a sampler of T = `num_steps` steps."""

    def extremes(self, num_steps: int) -> list[GradientPlan]:
        """Return the plans of most and of fewest steps, or the one that there is.

        The number of steps is uniform between theirs, so that their mean is the cost to expect.
        """
        return [self.draw(num_steps, torch.Generator())]

    @abstractmethod
    def check(self, num_steps: int) -> None:
        """Raise UsageError where a sampler of so many steps cannot be trained by this method."""

    def _error(self, setting: str, value: int, rule: str) -> UsageError:
        remedy = "change it or sampler.num_steps"
        return BadArgument(self, setting, f"is {value}, but must be {rule}; {remedy}")


def check_plan(plan: Any, num_steps: int, name: str) -> None:
    """Raise UsageError unless a plan trains steps that a walk of so many makes.

    Args:
        plan: What `draw` returned.
        num_steps: T.
        name: Of the method.
    """
    if not isinstance(plan, GradientPlan):
        raise UsageError(f"{name}.draw returned {described(plan)}; it returns a GradientPlan")
    stop = 1 if plan.stop is None else plan.stop
    if not 1 <= stop <= num_steps:
        raise UsageError(f"{name}.draw stops at step {stop}; steps are 1 to {num_steps}")
    trained = set(plan.trained)  # where there are copies, their last step has the gradient
    if not (trained or plan.num_copies) or not trained <= {*range(stop, num_steps + 1)}:
        raise UsageError(
            f"{name}.draw trains steps {sorted(trained)}; it trains some of those that are "
            f"made, {stop} to {num_steps}"
        )


class DRTune(GradientMethod):
    """K equally spaced steps from a random offset, detached inputs, and an early stop.

    The stop is uniform on {1, ..., m} and the trained steps are spread over the steps that are
    executed, so that there are always K of them.

    Args:
        k: K, the number of trained steps.
        m: Latest steps that may be replaced by one prediction of x_0; 1 walks to the end.
        detach_input: False is the ablation whose gradient norm grows with K.

    References:
        Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models (Wu et al., 2024),
        https://arxiv.org/abs/2405.00760
    """

    def __init__(self, k: int = 2, m: int = 11, detach_input: bool = True) -> None:
        at_least(1, self, k=k, m=m)
        self.k, self.m, self.detach_input = k, m, detach_input

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        stop = _randint(1, self.m, generator)
        executed, spacing = self._spread(num_steps, stop)
        return self._from(stop, _randint(1, executed - (self.k - 1) * spacing, generator), spacing)

    def extremes(self, num_steps: int) -> list[GradientPlan]:
        stops = sorted({1, self.m})
        return [self._from(stop, 1, self._spread(num_steps, stop)[1]) for stop in stops]

    def _spread(self, num_steps: int, stop: int) -> tuple[int, int]:
        """Return the number of executed steps, and the distance of trained ones."""
        executed = num_steps - stop + 1
        return executed, executed // self.k

    def _from(self, stop: int, offset: int, spacing: int) -> GradientPlan:
        first = stop - 1 + offset
        return GradientPlan(frozenset(first + i * spacing for i in range(self.k)), stop)

    def check(self, num_steps: int) -> None:
        if not 1 <= self.m < max(num_steps, 2):
            raise self._error("m", self.m, f"1 <= m < the sampler's {num_steps} steps")
        executed = num_steps - self.m + 1
        if not 1 <= self.k <= executed:
            rule = f"1 <= k <= {executed}, the steps that an early stop at m = {self.m} leaves"
            raise self._error("k", self.k, f"{rule} of the sampler's {num_steps}")


class DRaFT(GradientMethod):
    """DRaFT-K: backpropagation through the last K steps.

    Args:
        k: K, the number of trained steps.

    References:
        Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023),
        https://arxiv.org/abs/2309.17400
    """

    def __init__(self, k: int = 1) -> None:
        at_least(1, self, k=k)
        self.k = k

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        return GradientPlan(frozenset(range(1, self.k + 1)))

    def check(self, num_steps: int) -> None:
        if not 1 <= self.k <= num_steps:
            raise self._error("k", self.k, f"1 <= k <= the sampler's {num_steps} steps")


class DRaFTLV(GradientMethod):
    """DRaFT-LV: the last step, averaged over re-noised copies of x_0 for a lower variance.

    Args:
        num_copies: Copies of each x_0, noised to the level of the last step.

    References:
        Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023),
        Section 3.2, https://arxiv.org/abs/2309.17400
    """

    def __init__(self, num_copies: int = 2) -> None:
        at_least(1, self, num_copies=num_copies)
        self.num_copies = num_copies

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        return GradientPlan(frozenset(), num_copies=self.num_copies)

    def check(self, num_steps: int) -> None:
        """Any number of steps will do."""


class AlignProp(GradientMethod):
    """AlignProp: backpropagation through all steps after a random cut, drawn once per trajectory.

    Args:
        min_steps: Fewest trained steps.
        max_steps: Most trained steps; None allows all.

    References:
        Aligning Text-to-Image Diffusion Models with Reward Backpropagation (Prabhudesai et al.,
        2023), https://arxiv.org/abs/2310.03739
    """

    def __init__(self, min_steps: int = 1, max_steps: int | None = None) -> None:
        at_least(1, self, min_steps=min_steps, max_steps=max_steps)
        self.min_steps, self.max_steps = min_steps, max_steps

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        last = _randint(self.min_steps, self.max_steps or num_steps, generator)
        return GradientPlan(frozenset(range(1, last + 1)))

    def extremes(self, num_steps: int) -> list[GradientPlan]:
        ends = sorted({self.max_steps or num_steps, self.min_steps}, reverse=True)
        return [GradientPlan(frozenset(range(1, last + 1))) for last in ends]

    def check(self, num_steps: int) -> None:
        most = num_steps if self.max_steps is None else self.max_steps
        if not 1 <= self.min_steps <= most:
            raise self._error("min_steps", self.min_steps, f"1 <= min_steps <= {most}")
        if most > num_steps:
            raise self._error("max_steps", most, f"at most the sampler's {num_steps} steps")


class ReFL(GradientMethod):
    """ReFL: stop in a late range and predict x_0 there; only that prediction carries gradient.

    Args:
        m: The stop is uniform on the last m steps {1, ..., m}.

    References:
        ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation
        (Xu et al., 2023), https://arxiv.org/abs/2304.05977
    """

    detach_input = True

    def __init__(self, m: int = 6) -> None:
        at_least(1, self, m=m)
        self.m = m

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        stop = _randint(1, self.m, generator)
        return GradientPlan(frozenset([stop]), stop)

    def extremes(self, num_steps: int) -> list[GradientPlan]:
        return [GradientPlan(frozenset([stop]), stop) for stop in sorted({1, self.m})]

    def check(self, num_steps: int) -> None:
        if not 1 <= self.m < max(num_steps, 2):
            raise self._error("m", self.m, f"1 <= m < the sampler's {num_steps} steps")


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    """Draw from {low, ..., high}."""
    return int(torch.randint(low, high + 1, (), generator=generator))
