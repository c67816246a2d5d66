"""A window of steps with noise, for trajectories that are deterministic elsewhere."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lit_rlft.core.checks import at_least, one_of, require, within
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.streams import Stream

__all__ = ["Order", "SlidingWindow"]

_ROUNDING = 1e-6
"""Shares such as 0.29 of 100 steps are a little less than a whole number of them in floats."""

Order = Literal["forward", "random"]


@dataclass(frozen=True)
class SlidingWindow:
    """Steps with noise, which are the trained ones; all others are deterministic.

    "forward" starts at pure noise, moves on towards the data, and stays at the end (MixGRPO).
    "random" is drawn anew, all places alike (Flow-GRPO-Fast). The sampler's last step, which has no
    noise on most schedules, is never in the window.

    Attributes:
        size: Steps in the window.
        interval: Rounds after which it moves.
        stride: Steps that it moves by, of "forward".
        order: "forward" or "random".
        until: The window stays within this share of the sampler's steps, from pure noise on; half
            of 7 steps are 3.

    References:
        MixGRPO (Li et al., 2025), https://arxiv.org/abs/2507.21802
        Flow-GRPO (Liu et al., 2025), https://arxiv.org/abs/2505.05470
    """

    size: int = 4
    interval: int = 25
    stride: int = 1
    order: Order = "forward"
    until: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, self, "size", "interval", "stride")
        one_of(self, "order", get_args(Order))
        within(0, 1, self, "until")
        fits = self.order == "forward" or self.stride == 1
        require(fits, self, "stride", "1 with order random, which does not move by steps")

    def check(self, num_steps: int) -> None:
        """Raise BadArgument unless a sampler of so many steps, two at least, has room for it."""
        steps = "model.init_args.sampler.num_steps"
        rule = f"at most {num_steps - 1}, one less than {steps}: the last step has no noise"
        require(self.size < num_steps, self, "size", rule)
        enough = math.ceil(self.size / num_steps * 1e4 - _ROUNDING) / 1e4
        rule = f"at least {enough}, the share of its {self.size} of {num_steps} steps"
        require(self.size <= self.most(num_steps), self, "until", rule)

    def most(self, num_steps: int) -> int:
        """Return in how many of the sampler's steps, from the first on, the window may lie."""
        return min(math.floor(self.until * num_steps + _ROUNDING), num_steps - 1)

    def at(self, num_rounds: int, num_steps: int, seed: int = 0) -> tuple[int, int]:
        """Return the window's first step and the one after its last.

        Args:
            num_rounds: Rounds that are over.
            num_steps: Steps of the sampler; `most` of them are at least `size`.
            seed: Of the run, for "random".
        """
        last, moves = self.most(num_steps) - self.size, num_rounds // self.interval
        if self.order == "forward":
            first = min(moves * self.stride, last)
        else:
            (generator,) = generators([seed_from(seed, Stream.WINDOW, moves)])
            first = int(torch.randint(last + 1, (), generator=generator))
        return first, first + self.size
