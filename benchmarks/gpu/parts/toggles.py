"""Each switch alone, beside the settings without it: a guided call, and one with its backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.pipeline import Condition
from lit_rlft.loop.reference import LoRA, adapt

__all__ = ["TOGGLES", "measure"]

TOGGLES: dict[str, dict[str, Any]] = {
    "frozen weights in fp32": {"dtype": torch.float32},
    "channels last": {"channels_last": True},
    "block checkpointing": {"checkpoint_denoiser": True},
    "compile: blocks": {"compile": "blocks"},
    "compile: whole": {"compile": "whole"},
}
"""Settings of the pipeline; those that this version lacks are skipped by name."""

Inputs = tuple[Tensor, Tensor, Condition]


def measure(bench: Bench) -> None:
    """Time Stable Diffusion 1.5 with a LoRA under bf16 autocast, beside each switch in turn."""
    batch = bench.pick(8, 1)
    plain = _adapted(bench)
    for name, settings in TOGGLES.items():
        if bench.tiny and "compile" in settings:
            continue  # needs a compiler, and minutes
        bench.case({"toggle": name, "batch": batch}, partial(_beside, bench, plain, settings))
    bench.case({"toggle": "LoRA merged", "batch": batch}, lambda: _merged(bench, plain))
    bench.case({"toggle": "TF32, all in fp32", "batch": batch}, lambda: _tf32(bench))


def _adapted(bench: Bench, **settings: Any) -> TextToImagePipeline:
    pipeline = pipeline_of(bench, "sd", guidance_scale=7.5, **settings)
    adapt(pipeline, LoRA(8, 8), seed=0)
    pipeline.denoiser.train()
    return pipeline


def _inputs(bench: Bench, pipeline: TextToImagePipeline) -> Inputs:
    batch = bench.pick(8, 1)
    condition = pipeline.encode({"prompt": [f"a red ring, number {i}" for i in range(batch)]})
    blank = pipeline.blank(condition)
    return torch.randn_like(blank), torch.full((batch,), 0.5, device=bench.device), condition


def _calls(
    bench: Bench, pipeline: TextToImagePipeline, *, autocast: bool = True
) -> dict[str, Callable[[], None]]:
    """Return a call without gradients and one with its backward pass."""
    x, t, condition = _inputs(bench, pipeline)

    def cast() -> Any:
        return torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast)

    def call() -> None:
        with torch.no_grad(), cast():
            pipeline(x, t, condition)

    def train() -> None:
        with cast():
            loss = pipeline(x, t, condition).float().square().mean()
        loss.backward()
        pipeline.denoiser.zero_grad()

    return {"call": call, "train": train}


def _beside(bench: Bench, plain: TextToImagePipeline, settings: dict[str, Any]) -> Row:
    return _compared(bench, _calls(bench, plain), _calls(bench, _adapted(bench, **settings)))


def _compared(
    bench: Bench, without: dict[str, Callable[[], None]], switched: dict[str, Callable[[], None]]
) -> Row:
    """Return the ratios of seconds without the switch to those with it, and the memory of both."""
    found: Row = {}
    for kind in without:
        own = bench.turns({"without": without[kind], "with": switched[kind]})
        found |= {f"{kind}_{name}": row for name, row in own.items()}
        found[f"{kind}_speedup"] = own["without"]["seconds"] / own["with"]["seconds"]
        for name, call in (("without", without[kind]), ("with", switched[kind])):
            bench.fresh()
            call()
            found[f"{kind}_{name}_peak_gib"] = bench.peak()
    return found


def _merged(bench: Bench, plain: TextToImagePipeline) -> Row:
    """Compare sampling with the adapter as it is and with its update in the weights."""
    other = _adapted(bench)
    for layer in other.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    without, switched = _calls(bench, plain), _calls(bench, other)
    return _compared(bench, {"call": without["call"]}, {"call": switched["call"]})


def _tf32(bench: Bench) -> Row:
    """Compare single precision with and without TF32, without autocast."""
    calls = _calls(bench, _adapted(bench, dtype=torch.float32), autocast=False)

    def within(precision: str, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = precision == "high"
            try:
                call()
            finally:
                torch.set_float32_matmul_precision(before[0])
                torch.backends.cudnn.allow_tf32 = before[1]

        return run

    sides = ({k: within(p, call) for k, call in calls.items()} for p in ("highest", "high"))
    return _compared(bench, *sides)
