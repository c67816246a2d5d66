"""The cost of each part of a run, and of one sample: seconds, calls and operations."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from lightning import LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cost.counters import Cost, now
from lit_rlft.cost.peaks import peak_of
from lit_rlft.cost.throughput import RoundCost, throughput
from lit_rlft.distributed import gather
from lit_rlft.loop.hooks import Hooks

__all__ = ["CostMeter"]

_COUNTS = ("denoiser_calls", "prior_calls", "reward_calls", "flops")
_TEST, _SAMPLE = "test", "sample_"

Spent = dict[str, float]
Books = dict[str, dict[str, Spent]]
"""What was spent by stage and phase."""


class CostMeter(Hooks):
    """Counts cost by stage ("train", "validate", "test") and phase ("collect", "update", ...).

    Counts are reported over all processes, seconds are those of the first. Operations are those of
    forward passes; the time that counting them takes is not part of a phase's seconds. The counts
    are part of the checkpoint, so that a test reports what training spent. The operations and
    seconds so far go to the log under `cost/flops` and `time/elapsed`, and under `time/` each
    round's seconds by phase, the milliseconds of each phase per sample drawn
    (`collect_ms_per_sample`), `samples_per_second`, `denoiser_rows_per_second` and, on cards whose
    peak is known, `mfu`: the operations of forward and backward passes over what the card could do
    in that time in bfloat16, dense, by its maker's data sheet.
    """

    def __init__(self) -> None:
        self.books: Books = {}
        self._others: list[Books] = []
        self._begun: dict[str, tuple[float, Cost, int]] = {}
        self._first, self._world_size = True, 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember who the processes are, before books of a checkpoint come."""
        self._first, self._world_size = trainer.is_global_zero, trainer.world_size

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the test's counts afresh."""
        for books in (self.books, *self._others):
            books.pop(_TEST, None)

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        """Note the time and the counters."""
        assert isinstance(module, RewardFineTuner)
        self._begun[name] = (now(), replace(module.meter.current), module.num_samples)

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """Count what was spent since."""
        assert isinstance(module, RewardFineTuner)
        start, before, had = self._begun.pop(name)
        stage, spending = module.trainer.state.stage, module.meter.current
        if stage is None or module.trainer.sanity_checking:
            return
        page = self.books.setdefault(stage.value, {})
        spent = page.setdefault(name, defaultdict(float))
        # Operations are counted in the first calls, of the arm that is sampled first.
        counting = spending.counting_seconds - before.counting_seconds
        spent["seconds"] += now() - start - counting
        spent["samples"] += num_samples + (module.num_samples - had) // self._world_size
        for count in _COUNTS:
            spent[count] += getattr(spending, count) - getattr(before, count)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what training had spent before this round."""
        assert isinstance(pl_module, RewardFineTuner)
        self._before = self._spent(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the round, and hear what the other processes have spent."""
        assert isinstance(pl_module, RewardFineTuner)
        self._hear()
        after, before = self._spent(pl_module), self._before
        cost = RoundCost(
            after.seconds - before.seconds,
            after.samples - before.samples,
            after.denoiser_calls - before.denoiser_calls,
            after.flops - before.flops,
            {name: s - before.phases.get(name, 0.0) for name, s in after.phases.items()},
        )
        peak = peak_of(pl_module.device)
        for name, value in throughput(cost, trainer.world_size, peak).items():
            pl_module.log(f"time/{name}", value)
        pl_module.log("cost/flops", float(pl_module.meter.total("flops")))
        pl_module.log("time/elapsed", pl_module.meter.training.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear what the other processes have spent."""
        self._hear()

    def _hear(self) -> None:
        """Hear what the other processes have spent: the first one reports it and saves it."""
        _, *self._others = gather(self.books, self._world_size)

    def report(self) -> dict[str, Any]:
        """Return the counts and, per sample of each arm in the test, calls, operations, time.

        All processes must call this; what the first one returns is of all.
        """
        self._hear()
        books = self.state_dict()
        arms = _arms(books)
        per_sample = {
            f"{count}_per_sample": {
                arm: spent[count] / spent["samples"] for arm, spent in arms.items()
            }
            for count in ("denoiser_calls", "prior_calls", "flops")
        }
        seconds = {
            arm: spent["seconds"] / spent["samples"] for arm, spent in _arms(self.books).items()
        }
        plain = {
            stage: {name: _plain(spent) for name, spent in page.items()}
            for stage, page in books.items()
        }
        return {"phases": plain} | per_sample | {"seconds_per_sample": seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return the books of all processes, where this is the first one."""
        books = {
            stage: {name: dict(spent) for name, spent in page.items()}
            for stage, page in self.books.items()
        }
        for other in self._others:
            for stage, page in other.items():
                for name, spent in page.items():
                    # Processes work at the same time: seconds are not added.
                    total = books.setdefault(stage, {}).setdefault(name, {"seconds": 0.0})
                    for count in ("samples", *_COUNTS):
                        total[count] = total.get(count, 0.0) + spent[count]
        return books

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what all processes had spent, where this is the first one."""
        self._others = []
        self.books = {
            stage: {name: defaultdict(float, spent) for name, spent in page.items()}
            for stage, page in (state_dict if self._first else {}).items()
        }

    def _spent(self, module: RewardFineTuner) -> RoundCost:
        """Return what training has spent so far; the time of counting is no part of it."""
        own = module.meter.training
        phases = {name: spent["seconds"] for name, spent in self.books.get("train", {}).items()}
        return RoundCost(
            now() - own.counting_seconds,
            module.num_samples,
            module.meter.total("denoiser_calls"),
            own.flops + own.backward_flops,
            phases,
        )


def _arms(books: Books) -> dict[str, Spent]:
    """Return what each arm of the test spent on drawing its samples."""
    return {
        name.removeprefix(_SAMPLE): spent
        for name, spent in books.get(_TEST, {}).items()
        if name.startswith(_SAMPLE) and spent["samples"]
    }


def _plain(spent: Spent) -> dict[str, float]:
    """Return seconds and whole counts."""
    return {name: value if name == "seconds" else int(value) for name, value in spent.items()}
