"""The cost of each part of a run, and of one sample: seconds, calls and operations."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from lightning import LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cost.counters import Cost, now
from lit_rlft.cost.peaks import peak_of
from lit_rlft.cost.throughput import RoundCost, throughput
from lit_rlft.loop.hooks import Hooks

__all__ = ["CostMeter"]

_COUNTS = ("denoiser_calls", "prior_calls", "reward_calls", "flops")
_TEST, _SAMPLE = "test", "sample_"

Spent = dict[str, float]


class CostMeter(Hooks):
    """Counts cost by stage ("train", "validate", "test") and phase ("collect", "update", ...).

    Counts and seconds are those of this process. Operations are those of forward passes; the time
    that counting them takes is not part of a phase's seconds. The counts are part of the
    checkpoint, so that a test reports what training spent. The operations and seconds so far go to
    the log under `cost/flops` and `time/elapsed`, and under `time/` each round's seconds by phase,
    the milliseconds of each phase per sample drawn (`collect_ms_per_sample`),
    `samples_per_second`, `denoiser_rows_per_second` and, on cards whose peak is known, `mfu`: the
    operations of forward and backward passes over what the card could do in that time in bfloat16,
    dense, by its maker's data sheet.
    """

    def __init__(self) -> None:
        self.books: dict[str, dict[str, Spent]] = {}
        self._begun: dict[str, tuple[float, Cost]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the test's counts afresh."""
        self.books.pop(_TEST, None)

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        """Note the time and the counters."""
        assert isinstance(module, RewardFineTuner)
        self._begun[name] = (now(), replace(module.meter.current))

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """Count what was spent since."""
        assert isinstance(module, RewardFineTuner)
        start, before = self._begun.pop(name)
        stage, spending = module.trainer.state.stage, module.meter.current
        if stage is None or module.trainer.sanity_checking:
            return
        page = self.books.setdefault(stage.value, {})
        spent = page.setdefault(name, defaultdict(float))
        # Counted calls happen in whichever arm is sampled first.
        counting = spending.counting_seconds - before.counting_seconds
        spent["seconds"] += now() - start - counting
        spent["samples"] += num_samples
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
        """Log the round."""
        assert isinstance(pl_module, RewardFineTuner)
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

    def report(self) -> dict[str, Any]:
        """Return the counts and, per sample of each arm in the test, calls, operations, time."""
        arms = {
            name.removeprefix(_SAMPLE): spent
            for name, spent in self.books.get(_TEST, {}).items()
            if name.startswith(_SAMPLE) and spent["samples"]
        }
        books = {
            stage: {name: _plain(spent) for name, spent in page.items()}
            for stage, page in self.books.items()
        }
        return {"phases": books} | {
            f"{count}_per_sample": {
                arm: spent[count] / spent["samples"] for arm, spent in arms.items()
            }
            for count in ("denoiser_calls", "prior_calls", "flops", "seconds")
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            stage: {name: dict(spent) for name, spent in page.items()}
            for stage, page in self.books.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.books = {
            stage: {name: defaultdict(float, spent) for name, spent in page.items()}
            for stage, page in state_dict.items()
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


def _plain(spent: Spent) -> dict[str, float]:
    """Return seconds and whole counts."""
    return {name: value if name == "seconds" else int(value) for name, value in spent.items()}
