"""Measurements that tell when a reward is exploited."""

from dataclasses import dataclass
from typing import Literal, get_args

from lit_rlft.core.checks import one_of

__all__ = ["LARGE_FALL", "LARGE_RISE", "Guard"]

Worse = Literal["lower", "higher", "either"]


@dataclass(frozen=True)
class Guard:
    """How a measurement becomes worse when a model exploits its reward.

    Attributes:
        worse: The direction that is worse.
        least: Least change that counts, as a share of the reference's value; 0 takes any change
            that is beyond chance.
    """

    worse: Worse = "lower"
    least: float = 0.0

    def __post_init__(self) -> None:
        one_of(self, "worse", get_args(Worse))

    def broken(self, reference: float, gain: float) -> bool:
        """Return whether a change of the reference's value is one for the worse."""
        change = {"lower": -gain, "higher": gain, "either": abs(gain)}[self.worse]
        return change > self.least * abs(reference)


# What every tuned model loses some of, or moves away from: only much of it is a sign.
LARGE_FALL = Guard("lower", least=0.2)
LARGE_RISE = Guard("higher", least=0.2)
