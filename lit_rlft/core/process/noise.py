"""The noise of a sampler's steps: how much, of which kind, and at which of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlft.core.state import State, tree_map

__all__ = ["CPS", "FLOW_STEPS", "FlowSDE", "Noise", "StepNoiseLevel", "Within", "of_step", "within"]


@dataclass(frozen=True)
class FlowSDE:
    """Euler-Maruyama's steps of Flow-GRPO's stochastic differential equation.

    Attributes:
        scale: a in sigma_t = a sqrt(t / (1 - t)); 0.7 is published.
    """

    scale: float


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving steps: part of a level's noise is new, and there is no more of it.

    Attributes:
        scale: eta from 0 to 1: sin(eta pi / 2) of the noise's standard deviation is new; 0.8 is
            published.
    """

    scale: float


FLOW_STEPS: dict[str, type[FlowSDE | CPS]] = {"flow_sde": FlowSDE, "cps": CPS}
"""The noise of steps that flows have, by the name of their transition."""

StepNoiseLevel = float | FlowSDE | CPS
"""eta of the DDIM(eta) step, or the scale of another kind of step; 0 is deterministic."""


@dataclass(frozen=True)
class Within:
    """Noise in a window of a grid's steps alone; all others are deterministic.

    Attributes:
        noise: Of the steps in the window.
        first: Number of the window's first step, counted from 0 at pure noise.
        last: Number of the step after its last.
    """

    noise: StepNoiseLevel
    first: int
    last: int


Noise = StepNoiseLevel | Within
"""Noise of all steps of a grid."""


def of_step(noise: Noise, i: int) -> StepNoiseLevel:
    """Return the noise of step i of a grid."""
    if isinstance(noise, Within):
        return noise.noise if noise.first <= i < noise.last else 0.0
    return noise


def within(window: Within, rule: Callable[[StepNoiseLevel], State]) -> State:
    """Return the coefficients of a grid's steps, [T, C] of each field, from those of either kind.

    Args:
        window: Which steps have which noise.
        rule: From a noise to the coefficients of all steps.
    """

    def chosen(noisy: Tensor, still: Tensor) -> Tensor:
        steps = torch.arange(len(still), device=still.device)
        inside = (steps >= window.first) & (steps < window.last)
        return noisy.where(inside.unsqueeze(-1), still)

    return tree_map(chosen, rule(window.noise), rule(0.0))
