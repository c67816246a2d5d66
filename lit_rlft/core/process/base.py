"""The interface of a noising process."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Distribution
from lit_rlft.core.process.noise import CPS, FlowSDE, Noise, Within, within
from lit_rlft.core.process.steps import Steps, StepTables
from lit_rlft.core.randomness import Generators
from lit_rlft.core.settings import Recorded
from lit_rlft.core.state import State, batch_size, described, leaves
from lit_rlft.core.watched import Watched

__all__ = ["Process", "Step"]

Step = Callable[[State, State, State], Distribution]
"""`Process.step`."""


def _one_each(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss that raises UsageError unless it is [B]: others would broadcast in silence."""

    @wraps(loss)
    def answer(process: Any, prediction: State, *given: Any, **named: Any) -> Any:
        value, num = loss(process, prediction, *given, **named), batch_size(prediction)
        if not isinstance(value, Tensor) or value.shape != (num,):
            raise UsageError(
                f"{type(process).__name__}.loss returned {described(value)}; it is a tensor with "
                f"one loss per sample, [{num}]"
            )
        return value

    return answer


class Process(Recorded, Watched, ABC):
    """The mathematics of x_t: prior, forward and reverse transitions, denoising loss.

    Times `t` and `s` are [B] in [0, 1] with `s < t`; a *prediction* is what the denoiser returned
    for x_t and has the structure of a state.

    A reverse transition has two halves: `coefficients` is what it takes from its levels, and `step`
    applies that to states. Samplers and their replay compute the first half once (`steps`).

    Attributes:
        differentiable: Whether reverse transitions carry gradients from x_s to x_t.
        invertible: Whether the deterministic sampler can be run backwards.
        one_way: Why it cannot, and what to do, where it cannot.
        has_flow_steps: Whether there are noisy steps of flows (`flow_coefficients`).
    """

    differentiable: bool
    invertible: bool
    one_way: str = (
        "its steps draw from distributions, and samples do not tell their noise; use a pipeline "
        "with a continuous state"
    )
    has_flow_steps: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._tables = StepTables()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "transition" in vars(cls):
            raise TypeError(
                f"{cls.__name__} overrides transition; override its halves, coefficients and step, "
                "which samplers call"
            )
        if isfunction(loss := vars(cls).get("loss")):
            cls.loss = _one_each(loss)  # type: ignore[method-assign]

    def state_problem(self, x: State) -> str | None:
        """Say what x is, if it is no state of this process: its type, and what states are.

        The default takes any state.
        """
        return None

    def prediction_problem(self, prediction: State, x_t: State) -> str | None:
        """Say what a prediction for x_t is, if it has not its shape: this one, and the right one.

        The default takes any prediction. Otherwise sizes that broadcast would train in silence.
        """
        return None

    @abstractmethod
    def prior(self, blank: State) -> Distribution:
        """Return the distribution of x_1 for the shape, dtype and device of `blank`."""

    @abstractmethod
    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> State:
        """Return what `step` takes from its levels, [B, C] of each field; eta 0 is deterministic.

        In double precision, as long as single precision would not be exact enough.
        """

    def flow_coefficients(self, t: Tensor, s: Tensor, noise: FlowSDE | CPS) -> State:
        """Return `coefficients` of a step that flows have.

        Args:
            t: Levels that steps start from, [B].
            s: Levels that they lead to, [B].
            noise: Of the steps.

        Raises:
            UsageError: The process has no such steps.
        """
        raise UsageError(
            f"a {type(self).__name__} has no steps of type {type(noise).__name__}; set "
            "model.init_args.sampler.transition to eta"
        )

    def noisy_coefficients(self, t: Tensor, s: Tensor, noise: Noise) -> State:
        """Return what `step` takes from its levels, [B, C] of each field, under any noise.

        Args:
            t: Levels that steps start from, [B]; all of a grid, in order, for a window of it.
            s: Levels that they lead to, [B].
            noise: Of the steps.
        """
        if isinstance(noise, Within):
            return within(noise, lambda kind: self.noisy_coefficients(t, s, kind))
        if isinstance(noise, FlowSDE | CPS):
            return self.flow_coefficients(t, s, noise)
        return self.coefficients(t, s, noise)

    @abstractmethod
    def step(self, prediction: State, x_t: State, coefficients: State) -> Distribution:
        """Return the distribution of x_s given x_t under the denoiser.

        Args:
            prediction: The denoiser's for x_t.
            x_t: [B, ...].
            coefficients: Of each field [B, C], or [C] where all samples take the same step.
        """

    def noisy(self, coefficients: State) -> Tensor:
        """Return which steps may leave something to chance, bool [T].

        Args:
            coefficients: Of each field [T, C].
        """
        table = leaves(coefficients)[0]
        return torch.ones(len(table), dtype=torch.bool, device=table.device)

    def stepper(self, x_1: State) -> Step:
        """Return `step` for one walk: what all its states share is found once.

        Args:
            x_1: One of them.
        """
        return self.step

    def transition(
        self, prediction: State, x_t: State, t: Tensor, s: Tensor, eta: float
    ) -> Distribution:
        """Return the distribution of x_s given x_t under the denoiser; eta 0 is deterministic."""
        return self.step(prediction, x_t, self.coefficients(t, s, eta))

    def steps(self, times: Tensor, ends: Tensor | None, eta: Noise, like: State) -> Steps:
        """Return the steps of a grid for states like `like`; a grid is computed once.

        Args:
            times: [T + 1], decreasing.
            ends: [T], where each step leads; None is the grid's next.
            eta: Noise of the transitions.
            like: Their device, and the type of their numbers.
        """
        ends = times[1:] if ends is None else ends
        return self._tables.of(self.noisy_coefficients, times[:-1], ends, eta, like)

    def inverted(self, prediction: State, x_t: State, x_s: State, t: Tensor, s: Tensor) -> State:
        """Return a better guess of the state that the deterministic transition takes to x_s.

        One iteration of backward Euler: its fixed points are the states that lead to x_s.

        Args:
            prediction: The denoiser's at the guess x_t.
            x_t: The guess.
            x_s: Where the transition has to lead.
            t: Times of x_t, [B].
            s: Times of x_s, [B].

        Raises:
            NotImplementedError: The process is not invertible.
        """
        raise NotImplementedError(f"a {type(self).__name__} is not invertible")

    @abstractmethod
    def denoised(self, prediction: State, x_t: State, t: Tensor) -> State:
        """Return the estimate of x_0 that a prediction implies."""

    @abstractmethod
    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> State:
        """Draw x_t from the forward transition q(x_t | x_s)."""

    def num_dimensions(self, x: State) -> Tensor:
        """Return how many numbers of each state are free, float64 [B]: all, unless overridden."""
        num = sum(leaf.shape[1:].numel() for leaf in leaves(x))
        return torch.full((batch_size(x),), num, dtype=torch.float64, device=leaves(x)[0].device)

    def projected(self, x: State, like: State) -> State:
        """Return x [B, ...] without what no state has, such as numbers of empty slots.

        Args:
            x: A prediction or a difference of two; it is returned as it is, unless overridden.
            like: States, which tell their empty slots.
        """
        return x

    @abstractmethod
    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        """Return the denoising loss [B] at x_t for data known at level s.

        Its minimiser is the exact denoiser of the distribution of x_s carried to level t.
        At s = 0 it is the model's native loss.
        """

    @abstractmethod
    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        """Map uniform numbers [B] to training times in (low, 1]."""

    @abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """Return the sampler's grid [num_steps + 1], decreasing; its last entry is data."""

    def ends(self, num_steps: int) -> Tensor:
        """Return the level that each step of the grid leads to, [num_steps].

        It is the next of the grid, except under schedulers that step past it (`Schedule.ends`).
        """
        return self.times(num_steps)[1:]
