"""The cost of each part of a run, and of one sample: seconds, calls and operations."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from lightning import LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cost.counters import Cost, now
from lit_rlft.loop.hooks import Hooks

__all__ = ["CostMeter"]

_COUNTS = ("denoiser_calls", "prior_calls", "reward_calls", "flops")
_TEST, _SAMPLE = "test", "sample_"

Spent = dict[str, float]


class CostMeter(Hooks):
    """Counts cost by stage ("train", "validate", "test") and phase ("collect", "update", ...).

    Counts and seconds are those of this process. Operations are those of forward passes; the time
    that counting them takes is not part of a phase's seconds. The counts are part of the
    checkpoint, so that a test reports what training spent. Each round's seconds and the operations
    so far go to TensorBoard, under `time/` and `cost/flops`.
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
        self._before = {name: spent["seconds"] for name, spent in self._training.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the round."""
        assert isinstance(pl_module, RewardFineTuner)
        for name, spent in self._training.items():
            seconds = spent["seconds"] - self._before.get(name, 0.0)
            if seconds > 0:
                pl_module.log(f"time/{name}", seconds)
        pl_module.log("cost/flops", float(pl_module.meter.total("flops")))

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

    @property
    def _training(self) -> dict[str, Spent]:
        return self.books.get("train", {})


def _plain(spent: Spent) -> dict[str, float]:
    """Return seconds and whole counts."""
    return {name: value if name == "seconds" else int(value) for name, value in spent.items()}
