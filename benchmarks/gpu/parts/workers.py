"""How much of a slow reward's time workers hide behind sampling."""

from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer

from benchmarks.gpu.bench import Bench, Row, quartiles
from benchmarks.gpu.models import pipeline_of
from benchmarks.gpu.tuning import fit
from domains.text_to_image.rewards import JPEGIncompressibility
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.callbacks.cost_meter import CostMeter
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.side.rewards import RewardWorkers

__all__ = ["measure"]


class Times(Callback):
    """Keeps what each round logs under `time/`."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the round's before, which all callbacks have logged by now."""
        if batch_idx > 0:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the last round's."""
        logged = trainer.logged_metrics
        self.rounds.append({n: float(v) for n, v in logged.items() if n.startswith("time/")})


def measure(bench: Bench) -> None:
    """Run rounds of P-GRAFT on Stable Diffusion 1.5 with JPEG files as reward, both ways."""
    kind: Any = bench.pick("process", "thread")
    for name, workers in (("between", None), (kind, RewardWorkers(kind))):
        bench.case({"rewards": name}, partial(_rounds, bench, workers))


def _rounds(bench: Bench, workers: RewardWorkers | None) -> Row:
    prompts, steps, rounds = bench.pick((8, 10, 4), (1, 2, 2))
    tuner = PGRAFT(
        pipeline_of(bench, "sd", guidance_scale=5.0, decode_batch_size=8),
        JPEGIncompressibility(),
        num_candidates=4,
        sampler=Sampler(steps),
        lora=LoRA(8, 8),
        microbatch_size=2,
        sampling_batch_size=8,
        reward_workers=workers,
    )
    times = Times()
    fit(bench, tuner, [CostMeter(), times], rounds, prompts)
    after = times.rounds[1:]  # the first one warms up, and waits for workers to start
    names = ("reward_hidden", "reward_waited")
    means = {
        f"{name}_seconds": sum(own[f"time/{name}"] for own in after) / len(after)
        for name in names
        if f"time/{name}" in after[0]
    }
    return {**quartiles([own["time/collect"] for own in after]), **means, "samples": 4 * prompts}
