"""Peak memory of SDXL LoRA rounds at 1,024 pixels, for cards of 24 GB."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningModule

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from benchmarks.gpu.tuning import fit
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.counters import now
from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.reference import LoRA

__all__ = ["measure"]


class Peaks(Hooks):
    """Keeps each phase's peak of allocated memory in GiB, and its seconds."""

    def __init__(self) -> None:
        self.found: Row = {}

    def on_phase_start(self, module: LightningModule, name: str) -> None:
        """Begin the peak anew."""
        self._began = now()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """Keep it."""
        self.found[f"{name}_seconds"] = now() - self._began
        if module.device.type == "cuda":
            self.found[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def measure(bench: Bench) -> None:
    """Run two rounds each of P-GRAFT, DDPO and DRTune; the second one is kept."""
    common: dict[str, Any] = {"lora": LoRA(8, 8), "microbatch_size": 1, "sampling_batch_size": 1}
    steps = bench.pick(4, 2)
    noisy = Sampler(steps, 1.0)
    makers: dict[str, Callable[[Any], RewardFineTuner]] = {
        "P-GRAFT": lambda p: PGRAFT(
            p, Brightness(), num_candidates=2, sampler=Sampler(steps), **common
        ),
        "DDPO": lambda p: DDPO(p, Brightness(), num_candidates=2, sampler=noisy, **common),
        "DRTune": lambda p: RewardGradient(
            p, Brightness(), method=DRTune(1, 1), sampler=Sampler(steps), **common
        ),
    }
    for name, make in makers.items():
        bench.case({"algorithm": name}, partial(_round, bench, make))


def _round(bench: Bench, make: Callable[[Any], RewardFineTuner]) -> Row:
    pipeline = pipeline_of(
        bench, "sdxl", guidance_scale=5.0, checkpoint_denoiser=True, decode_batch_size=1
    )
    peaks = Peaks()
    fit(bench, make(pipeline), [peaks], 2, 1)
    sizes = [size for name, size in peaks.found.items() if name.endswith("peak_gib")]
    reserved = torch.cuda.max_memory_reserved() / 2**30 if bench.cuda else None
    return {**peaks.found, "peak_gib": max(sizes, default=None), "reserved_gib": reserved}
