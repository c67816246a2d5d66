"""The experience that a round collects, and the draws of `predict`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.answers import is_number
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.samples import Samples
from lit_rlft.core.state import State, described, index, num_rows

__all__ = ["Draw", "Experience", "check_experience"]


@dataclass(frozen=True)
class Experience:
    """The n samples that one collect returns for the updates, and what is known of them.

    Attributes:
        states: Named states, each with n rows (e.g. the accepted x_tau).
        condition: n rows.
        seeds: n integers that seed each sample's noise during the updates.
        metrics: Numbers to log, averaged over the processes where they are not NaN.
        histograms: Values to show as histograms, by name.
        counts: Number of samples of each row of the batch, in order, n in all; None where every
            row has as many. The samples of a row lie side by side.
    """

    states: Mapping[str, State]
    condition: Condition
    seeds: Sequence[int]
    metrics: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Sequence[int] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Return n."""
        return len(self.seeds)

    @property
    def num_terms(self) -> int:
        """Number of terms of the loss, which microbatches share out: here one per sample."""
        return len(self)

    @property
    def terms_per_sample(self) -> Tensor:
        """Number of terms of each sample, int64 [n]."""
        return torch.ones(len(self), dtype=torch.int64)

    def terms(self, rows: Tensor) -> "Experience":
        """Select terms of the loss, as many rows."""
        return self.index(rows)

    def index(self, rows: Tensor) -> "Experience":
        """Select samples."""
        states = {name: index(state, rows) for name, state in self.states.items()}
        seeds = [self.seeds[row] for row in rows.tolist()]
        return Experience(states, self.condition.index(rows), seeds)


def check_experience(found: Any, name: str) -> None:
    """Raise UsageError unless what a round collected is an experience whose parts fit together.

    Args:
        found: What `collect` returned.
        name: Of the algorithm.
    """
    if problem := _problem(found):
        raise UsageError(f"{name}.collect returned {problem}")


_PARTS = {"states": Mapping, "condition": Condition, "metrics": Mapping, "histograms": Mapping}


def _problem(found: Any) -> str | None:
    if not isinstance(found, Experience):
        return f"{described(found)}; it returns a lit_rlft.loop.experience.Experience"
    for name, kind in _PARTS.items():
        if not isinstance(part := getattr(found, name), kind):
            return f"an Experience whose {name} is {described(part)}; it is a {kind.__name__}"
    if not hasattr(found.seeds, "__len__"):
        return f"an Experience whose seeds are {described(found.seeds)}; they are n integers"
    num = len(found)
    for name, state in found.states.items():
        if num_rows(state) != num:
            return f"an Experience with {num} seeds whose state {name!r} is {described(state)}"
    if len(found.condition) != num:
        return f"an Experience with {num} seeds, but a condition of {len(found.condition)} rows"
    if found.counts is not None and sum(found.counts) != num:
        return f"an Experience with {num} seeds, but counts for {sum(found.counts)} samples"
    for name, value in found.metrics.items():
        if not is_number(value):
            return f"an Experience whose metric {name!r} is {described(value)}; it is a number"
    for name, values in found.histograms.items():
        if not isinstance(values, Tensor):
            return f"an Experience whose histogram {name!r} is {described(values)}, not a tensor"
    return None


@dataclass(frozen=True)
class Draw:
    """Decoded samples with their conditions, the integers their noise came from, their rewards."""

    samples: Any
    condition: Condition
    seeds: Sequence[int]
    rewards: Tensor

    def to(self, device: torch.device | str) -> "Draw":
        """Move samples and rewards, as Lightning does with predictions that it keeps."""
        movable = isinstance(self.samples, Tensor | Samples)
        samples = self.samples.to(device) if movable else self.samples
        return replace(self, samples=samples, rewards=self.rewards.to(device))
