"""Rewards that tests of workers send to other processes: they wait, die, hang, fail."""

import os
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward

__all__ = ["Dies", "Hangs", "Raises", "Sleeps", "Starts", "Sums"]


class Sums(Reward):
    """A reward whose last bits depend on how it is computed."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(64, 2, generator=generator))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return self.scale * (samples @ self.weight.T.to(samples)).tanh().sum(dim=1)

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        return {self.name: self(samples, condition), "Sums/first": samples[:, 0]}


class Sleeps(Sums):
    """Takes its time for every call."""

    def __init__(self, seconds: float, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.seconds = seconds

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(samples, condition)


class Starts(Sums):
    """Starts a process of its own, whose number is its value."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        number = subprocess.Popen(["sleep", "300"]).pid
        return torch.full((len(samples),), number, dtype=torch.float64)


class _Once(Sums):
    """Misbehaves at some of the calls of all its processes, which a file counts."""

    def __init__(self, calls: list[int], counter: str) -> None:
        super().__init__()
        self.calls, self.counter = calls, counter

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        with Path(self.counter).open("a") as file:
            file.write("x")
        if len(Path(self.counter).read_text()) in self.calls:
            self.misbehave()
        return super().forward(samples, condition)

    def misbehave(self) -> None:
        raise NotImplementedError


class Dies(_Once):
    """Ends its process."""

    def misbehave(self) -> None:
        os._exit(3)


class Hangs(_Once):
    """Does not answer for a long time."""

    def misbehave(self) -> None:
        time.sleep(60)


class Raises(_Once):
    """Warns, and raises an error that no pickle holds."""

    def misbehave(self) -> None:
        warnings.warn("about to fail", UserWarning, stacklevel=1)
        raise UsageError("give this reward other samples")
