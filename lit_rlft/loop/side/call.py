"""What a worker is asked, the surroundings it is asked in, and its answer."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.answers import unchanged
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.samples import Samples

__all__ = ["Answer", "Call", "Surroundings", "answer", "moved"]

_TYPES = ("cpu", "cuda")
"""Kinds of devices that can have an autocast of their own."""


@dataclass(frozen=True)
class Surroundings:
    """What a reward's numbers depend on beside its arguments.

    Attributes:
        inference: Whether torch is in inference mode.
        autocast: Half precision by kind of device, where autocast is on.
        default_dtype: Type of new tensors.
    """

    inference: bool
    autocast: Mapping[str, torch.dtype]
    default_dtype: torch.dtype

    @classmethod
    def here(cls) -> "Surroundings":
        """Return those of this thread."""
        on = [kind for kind in _TYPES if torch.is_autocast_enabled(kind)]
        autocast = {kind: torch.get_autocast_dtype(kind) for kind in on}
        return cls(torch.is_inference_mode_enabled(), autocast, torch.get_default_dtype())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have them for the block, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.inference:
                stack.enter_context(torch.inference_mode())
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@dataclass(frozen=True)
class Call:
    """One question.

    Attributes:
        kind: What is asked of the reward: its values, or all that it reports.
        samples: Decoded samples.
        condition: One row per sample.
        device: Where the reward computes.
        dtype: Type that the trainer gives the weights of rewards; None leaves them as they are.
        surroundings: Those of the asker.
    """

    kind: Literal["forward", "evaluate"]
    samples: Any
    condition: Condition
    device: str
    dtype: torch.dtype | None
    surroundings: Surroundings = field(default_factory=Surroundings.here)

    def to(self, device: str, *, with_tables: bool = True) -> "Call":
        """Return the question with everything on a device."""
        tables = {name: moved(table, device) for name, table in self.condition.tables.items()}
        condition = replace(self.condition, tables=tables if with_tables else {})
        return replace(self, samples=moved(self.samples, device), condition=condition)


class Answer(NamedTuple):
    """What a reward returned, on the CPU, and how long it took.

    Attributes:
        value: What it returned, usually a tensor or a dict of tensors.
        seconds: Spent on it.
    """

    value: Any
    seconds: float


def answer(reward: Reward, call: Call) -> Answer:
    """Let a reward answer; its tensors come to the CPU, where their numbers are known."""
    start = time.perf_counter()
    call = call.to(call.device)
    with call.surroundings.entered(), unchanged(call.samples, reward.name):
        ask = reward if call.kind == "forward" else reward.evaluate
        value = ask(call.samples, call.condition)
    return Answer(moved(value, "cpu"), time.perf_counter() - start)


def moved(value: Any, device: str) -> Any:
    """Return tensors, samples, and dicts of tensors on a device; anything else as it is."""
    if isinstance(value, Tensor | Samples):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return value
