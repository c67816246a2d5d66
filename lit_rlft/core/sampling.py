"""The sampler: a grid of times and the amount of noise, walked from x_1 to x_0."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, at_least, one_of, require, within
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import CPS, FLOW_STEPS, FlowSDE, Noise, Process, of_step
from lit_rlft.core.randomness import Generators, next_step, step_noise
from lit_rlft.core.state import State, batch_size, index, leaves

__all__ = ["Denoiser", "Inverted", "Sampler", "Transition", "steps_of_share", "walk"]

Denoiser = Callable[[State, Tensor, Condition], State]
"""(x_t, t [B], condition) -> prediction."""


Transition = Literal["eta", "flow_sde", "cps"]
"""The kinds of noisy steps: DDIM(eta), Flow-GRPO's stochastic differential equation, and steps that
preserve the coefficients of signal and noise."""

_MOST_STEPS = 100_000
"""Far more steps than any sampler needs; a slip of the keyboard would never end."""


@dataclass(frozen=True)
class Inverted:
    """Initial noise that the deterministic sampler takes to given data, and how well it does.

    Attributes:
        x_1: [B, ...].
        residuals: [B], the largest error in backward Euler's equation over all steps, in units of
            the state, at the state that the next step started from; infinite where numbers
            overflowed. A solver without memory starts the next step from one evaluation later
            (`Solution`).
        iterations: [B] int64, evaluations of the denoiser over all steps.
    """

    x_1: State
    residuals: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Sampler:
    """How a trajectory is discretised.

    Attributes:
        num_steps: Denoiser evaluations from noise to data.
        eta: Noise of each step: 0 is deterministic, 1 the ancestral sampler. Of "flow_sde" it is
            the scale a, 0.7 as published; of "cps" sin(eta pi / 2) of a level's noise is new, with
            0.8 as published.
        transition: "eta" takes DDIM(eta)'s steps; "flow_sde" those of Flow-GRPO's stochastic
            differential equation, and "cps" coefficients-preserving ones, which Gaussian states
            have.
    """

    num_steps: int = 20
    eta: float = 0.0
    transition: Transition = "eta"

    def __post_init__(self) -> None:
        at_least(1, self, "num_steps")
        within(1, _MOST_STEPS, self, "num_steps")
        one_of(self, "transition", get_args(Transition))
        within(0, 2 if self.transition == "flow_sde" else 1, self, "eta")

    @property
    def noise(self) -> float | FlowSDE | CPS:
        """The noise of the steps, as a process takes it."""
        if not self.eta or self.transition == "eta":
            return self.eta
        return FLOW_STEPS[self.transition](self.eta)

    def sample(
        self,
        denoiser: Denoiser,
        process: Process,
        x_1: State,
        condition: Condition,
        noise: Generators = None,
    ) -> State:
        """Return x_0 of the trajectories that start at `x_1`."""
        times = process.times(self.num_steps)
        ends = process.ends(self.num_steps)
        *_, (_, x_0) = walk(denoiser, process, x_1, condition, times, self.noise, noise, ends)
        return x_0

    def invert(
        self,
        denoiser: Denoiser,
        process: Process,
        x_0: State,
        condition: Condition,
        solver: FixedPoint | None = None,
    ) -> Inverted:
        """Return the x_1 that `sample` takes to `x_0` with as many steps.

        Each step from t to s is undone by backward Euler, with the denoiser at time t, as the step
        called it. Call this without gradients.

        Raises:
            UsageError: The sampler draws noise, or the process is not invertible.
        """
        if not process.invertible:
            raise UsageError(
                f"the sampler of a {type(process).__name__} cannot be inverted: {process.one_way}"
            )
        require(not self.eta, self, "eta", "0: a sampler that draws noise has no inverse")
        x, times = x_0, process.times(self.num_steps).to(leaves(x_0)[0].device)
        ends = process.ends(self.num_steps).to(times)
        residuals = torch.zeros(batch_size(x_0), device=times.device)
        iterations = torch.zeros_like(residuals, dtype=torch.int64)
        for i in reversed(range(self.num_steps)):
            back = _backward_euler(denoiser, process, x, condition, times[i], ends[i])
            solution = (solver or FixedPoint()).solve(back, x)
            x, iterations = solution.state, iterations + solution.iterations
            residuals = residuals.maximum(solution.residuals.to(residuals))
        return Inverted(x, residuals, iterations)


def steps_of_share(share: float, num_steps: int) -> int:
    """Return how many of a sampler's steps a share of them is: above 0 one at least."""
    return max(round(share * num_steps), int(share > 0))


def walk(
    denoiser: Denoiser,
    process: Process,
    x_1: State,
    condition: Condition,
    times: Tensor,
    eta: Noise,
    noise: Generators = None,
    ends: Tensor | None = None,
) -> Iterator[tuple[int, State]]:
    """Iterate over (i, x at times[i]) from the start, i = 0, to the data, i = num_steps.

    Args:
        denoiser: Called once per step with x_t, t [B] and the condition.
        process: Gives each reverse transition.
        x_1: State at `times[0]`.
        condition: One row per sample.
        times: [num_steps + 1], decreasing.
        eta: Noise of the transitions.
        noise: One generator per sample, or None for torch's global one.
        ends: [num_steps], where each step leads (`Process.ends`); None is the grid's next.
    """
    x, size = x_1, batch_size(x_1)
    steps, step = process.steps(times, ends, eta, x_1), process.stepper(x_1)
    ahead = step_noise(noise, len(steps))
    yield 0, x
    for i in range(len(steps)):
        prediction = denoiser(x, steps.levels(i, size), condition)
        transition = step(prediction, x, steps.row(i))
        if process.differentiable and of_step(eta, i) == 0:
            x = transition.mean
        else:
            x = transition.rsample(next_step(ahead))
        yield i + 1, x


def _backward_euler(
    denoiser: Denoiser, process: Process, x_s: State, condition: Condition, t: Tensor, s: Tensor
) -> Callable[[State, Tensor], State]:
    """Return a map whose fixed points are the x_t that lead to `x_s`."""

    def back(x_t: State, rows: Tensor) -> State:
        level, below = t.expand(len(rows)), s.expand(len(rows))
        prediction = denoiser(x_t, level, condition.index(rows.to(condition.rows.device)))
        return process.inverted(prediction, x_t, index(x_s, rows), level, below)

    return back
