"""A reward that takes its time, in a file of its own: other processes can import it."""

import time
from typing import Any

from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward

__all__ = ["SlowCoordinate"]


class SlowCoordinate(Reward):
    """A coordinate, after some time per sample."""

    def __init__(self, axis: int, seconds_per_sample: float) -> None:
        super().__init__()
        self.axis, self.seconds_per_sample = axis, seconds_per_sample

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        time.sleep(len(condition) * self.seconds_per_sample)
        return samples[:, self.axis]
