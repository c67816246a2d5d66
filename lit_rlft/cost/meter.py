"""Who pays for what is computed: training, an evaluation, or nobody."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.cost.counters import (
    Cost,
    count_calls,
    count_flops,
    flops_per_call,
    peak_memory_bytes,
)

__all__ = ["Meter"]

_COUNTS = ("denoiser_calls", "prior_calls", "reward_calls", "flops")


class Meter:
    """The counters of training, and those that count at present.

    Processes need not spend the same, so what the others have spent is told at the end of a round.

    Attributes:
        training: What training has spent on this process, also before it was resumed.
        current: The counters that count at present: training's, or those of an evaluation.
        flops_per_call: Operations of the denoiser on one row; 0 until they are measured.
    """

    def __init__(self) -> None:
        self.training = self.current = Cost()
        self.flops_per_call = 0
        self._others = dict.fromkeys(_COUNTS, 0)
        self._started = self._paused = self._seconds_before = 0.0

    def watch(self, pipeline: Pipeline, trained: nn.Module, reference: nn.Module) -> None:
        """Count the calls and operations of networks from now on.

        Args:
            pipeline: Its denoiser is counted.
            trained: What is trained; outside the pipeline it is the network of a learned prior.
            reference: Its children are counted as denoisers too.
        """
        for network in (pipeline.denoiser, *reference.children()):
            count_calls(network, lambda: self.current)
            count_flops(network, lambda: self.current)
        if trained not in pipeline.modules():
            count_calls(trained, lambda: self.current, "prior_calls")
            count_flops(trained, lambda: self.current)

    def start_training(self) -> None:
        """Bill training from now on, and start its clock."""
        self.current, self._started = self.training, time.monotonic()
        self._seconds_before = self.training.seconds

    def counts(self) -> dict[str, int]:
        """Return what the present bill has counted on this process, by name."""
        return {name: getattr(self.current, name) for name in _COUNTS}

    def end_round(self, everyone: Sequence[Mapping[str, int]]) -> None:
        """Note how long training has taken so far, and what all processes have spent.

        Args:
            everyone: The `counts` of every process.
        """
        self.training.seconds = self._seconds_before + time.monotonic() - self._started
        own = self.counts()
        self._others = {n: sum(part[n] for part in everyone) - own[n] for n in _COUNTS}

    def total(self, count: str) -> int:
        """Return what training has spent over all processes.

        Args:
            count: "denoiser_calls", "prior_calls", "reward_calls" or "flops".
        """
        return int(getattr(self.training, count)) + self._others[count]

    def as_dict(self) -> dict[str, Any]:
        """Return what training has spent over all processes, and its seconds, for a checkpoint."""
        return {**self.training.as_dict(), **{name: self.total(name) for name in _COUNTS}}

    def restore(self, cost: Mapping[str, Any], *, first: bool) -> None:
        """Go on from what `as_dict` returned.

        Args:
            cost: What all processes had spent.
            first: Whether this is the process that takes it on.
        """
        nothing, all_of_it = dict.fromkeys(_COUNTS, 0), {name: int(cost[name]) for name in _COUNTS}
        vars(self.training).update({**cost, **(all_of_it if first else nothing)})
        self._others = nothing if first else all_of_it

    def spent(self, num_samples: int) -> dict[str, int]:
        """Return what training has cost so far, over all processes, for the log.

        Args:
            num_samples: Samples drawn by all processes.
        """
        calls = {name: self.total(name) for name in ("reward_calls", "denoiser_calls")}
        return {"samples": num_samples, **calls}

    def start_evaluation(self) -> None:
        """Bill an evaluation in the middle of training, whose clock stands still."""
        self.current, self._paused = Cost(), time.monotonic()

    def end_evaluation(self) -> None:
        """Bill training again."""
        self.current = self.training
        self._started += time.monotonic() - self._paused

    def start_test(self) -> None:
        """Bill a test, with a clock of its own."""
        self.current, self._started = Cost(), time.monotonic()

    @contextmanager
    def unbilled(self) -> Iterator[None]:
        """Bill nobody for the block, which computes only to be looked at."""
        billed, self.current = self.current, Cost()
        try:
            yield
        finally:
            self.current = billed

    @contextmanager
    def billing(self, rows: int, of: int) -> Iterator[None]:
        """Bill some of the rows that the block computes; the others only fill up a batch.

        Args:
            rows: Number of rows that are billed.
            of: Number of all rows.
        """
        bill, before = self.current, replace(self.current)
        yield
        for name in (*_COUNTS, "backward_flops"):
            begun = getattr(before, name)
            setattr(bill, name, begun + (getattr(bill, name) - begun) * rows // of)

    def look_at(self, pipeline: Pipeline, condition: Condition) -> None:
        """Measure, once, the operations of a denoiser call."""
        if not self.flops_per_call:
            with self.unbilled():
                self.flops_per_call = flops_per_call(pipeline, condition)

    def report(self, everyone: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Return what training and the test spent, over all processes, for metrics.json.

        Args:
            everyone: The `counts` of every process.
        """
        training = {name: self.total(name) for name in _COUNTS}
        test = {f"test_{name}": sum(part[name] for part in everyone) for name in _COUNTS}
        return {
            **training,
            "seconds": self.training.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **test,
            "test_seconds": time.monotonic() - self._started,
            "flops_per_denoiser_call": self.flops_per_call,
        }
