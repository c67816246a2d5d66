"""How a model draws: where it starts, and who denoises which steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.distribution import Distribution
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import CPS, FLOW_STEPS, FlowSDE, Noise, Process, Within
from lit_rlft.core.randomness import Generators, step_noise
from lit_rlft.core.sampling import Denoiser, walk
from lit_rlft.core.state import State, leaves

__all__ = ["Leg", "Merged", "Prior", "Route", "noise_told", "steps_told", "tuned_part"]

Prior = Callable[[Condition], Distribution]
"""From conditions to the distribution of x_1."""


Merged = Callable[[Callable[[], State]], AbstractContextManager[None]]
"""From a prediction of the tuned model to a context in which it draws with fewer kernels."""


def _as_it_is(predict: Callable[[], State]) -> AbstractContextManager[None]:
    return nullcontext()


class Leg(NamedTuple):
    """A part of a route that one denoiser runs.

    Attributes:
        denoiser: Who runs it.
        num_steps: Number of the sampler's steps; 0 leaves the leg out.
        tuned: Whether the denoiser is the one being tuned.
    """

    denoiser: Denoiser
    num_steps: int
    tuned: bool


@dataclass(frozen=True)
class Route:
    """The way of the tuned model, or of the reference, from noise to data.

    Attributes:
        process: The noising process.
        prior: Where the way starts.
        legs: Who denoises, in the order of the steps.
        eta: Noise of the transitions.
        merged: Merges the tuned model's adapter for as long as nobody needs log-probabilities.
    """

    process: Process
    prior: Prior
    legs: Sequence[Leg]
    eta: Noise
    merged: Merged = _as_it_is

    @property
    def num_steps(self) -> int:
        """Number of steps of all legs."""
        return sum(leg.num_steps for leg in self.legs)

    @cached_property
    def times(self) -> Tensor:
        """The grid of noise levels, [num_steps + 1], decreasing."""
        return self.process.times(self.num_steps)

    @cached_property
    def ends(self) -> Tensor:
        """The level that each step leads to, [num_steps]."""
        return self.process.ends(self.num_steps)

    @property
    def tuned_steps(self) -> Tensor:
        """Which steps the tuned denoiser runs, bool [num_steps]."""
        return torch.tensor([leg.tuned for leg in self.legs for _ in range(leg.num_steps)])

    @property
    def deterministic(self) -> bool:
        """Whether x_1 alone decides x_0."""
        return self.eta == 0 and self.process.differentiable

    def first_prediction(self, condition: Condition, noise: Generators) -> State:
        """Return what the tuned model predicts of x_1.

        Args:
            condition: One row per sample.
            noise: One generator per sample, or None for torch's global one.
        """
        x_1 = self.prior(condition).sample(noise)
        t = self.times[0].to(leaves(x_1)[0].device).expand(len(condition))
        return next(leg.denoiser for leg in self.legs if leg.tuned)(x_1, t, condition)

    def walk(
        self, condition: Condition, noise: Generators, x: State | None = None, first: int = 0
    ) -> Iterator[tuple[int, State]]:
        """Iterate over (i, x at times[i]), from i = `first` to x_0 (i = num_steps).

        Args:
            condition: One row per sample.
            noise: One generator per sample, or None for torch's global one.
            x: State at times[first]; drawn from the prior unless given.
            first: Index of the grid to start at; above 0 with a state alone.
        """
        x = self.prior(condition).sample(noise) if x is None else x
        ahead, end = step_noise(noise, self.num_steps - first), 0
        yield first, x
        for leg in self.legs:
            end += leg.num_steps
            args = (condition, self.times[first : end + 1], self.eta, ahead, self.ends[first:end])
            for i, state in walk(leg.denoiser, self.process, x, *args) if first < end else ():
                if i:
                    yield first + i, (x := state)
            first = max(first, end)


def tuned_part(steps: Tensor) -> dict[str, int]:
    """Return what a model card says of the steps that the tuned model runs.

    Args:
        steps: `Route.tuned_steps`; those of the tuned model lie side by side.

    Returns:
        `num_steps` of the sampler, `tuned_steps` of the tuned model, and `skipped_steps` before its
        first one.
    """
    skipped = int(steps.int().argmax()) if steps.any() else 0
    return {
        "num_steps": len(steps),
        "tuned_steps": int(steps.sum()),
        "skipped_steps": skipped,
    }


def steps_told(route: Route) -> dict[str, Any]:
    """Return what a model card says of a route's steps: `tuned_part` and `noise_told`."""
    return {**tuned_part(route.tuned_steps), **noise_told(route.eta)}


def noise_told(noise: Noise) -> dict[str, Any]:
    """Return what a model card says of the noise of a route's steps.

    Returns:
        `eta` and `transition` of the sampler; `noisy_steps`, the first one and the one after the
        last, where not all steps have noise.
    """
    if isinstance(noise, Within):
        return {**noise_told(noise.noise), "noisy_steps": [noise.first, noise.last]}
    if not isinstance(noise, FlowSDE | CPS):
        return {"eta": float(noise), "transition": "eta"}
    names = {kind: name for name, kind in FLOW_STEPS.items()}
    return {"eta": noise.scale, "transition": names[type(noise)]}
