"""A window of the sampler's steps that slides over training."""

from dataclasses import dataclass

from lit_rlft.core.checks import at_least

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow:
    """Steps with noise, which are the trained ones; all others are deterministic (MixGRPO).

    The window starts at pure noise, moves on towards the data, and stays at the end. The sampler's
    last step, which has no noise on most schedules, is never in it.

    Attributes:
        size: Steps in the window.
        interval: Rounds after which it moves.
        stride: Steps that it moves by.

    References:
        MixGRPO (Li et al., 2025), https://arxiv.org/abs/2507.21802
    """

    size: int = 4
    interval: int = 25
    stride: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "size", "interval", "stride")

    def at(self, num_rounds: int, num_steps: int) -> tuple[int, int]:
        """Return the window's first step and the one after its last.

        Args:
            num_rounds: Rounds that are over.
            num_steps: Steps of the sampler, more than `size`.
        """
        first = min(num_rounds // self.interval * self.stride, num_steps - 1 - self.size)
        return first, first + self.size
