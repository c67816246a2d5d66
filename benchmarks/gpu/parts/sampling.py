"""Sampling of Stable Diffusion 1.5 beside diffusers' official pipeline, in bf16."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from benchmarks.sampling import ours, theirs
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.counters import flop_counter

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Draw 1, 8 and 32 pictures: the official pipeline, ours, and ours compiled.

    All run from prompts to pictures, with guidance, without noise. Weights and activations of all
    are bfloat16.
    """
    steps, batches = bench.pick((20, (1, 8, 32)), (2, (1, 2)))
    settings: dict[str, Any] = {"guidance_scale": 7.5, "decode_batch_size": 8}
    plain = pipeline_of(bench, "sd", **settings)
    compiled = None if bench.tiny else pipeline_of(bench, "sd", compile="blocks", **settings)
    for batch in batches:
        bench.case(
            {"batch": batch, "steps": steps, "arm": "all"},
            partial(_rows, bench, plain, compiled, batch, steps),
        )
    bench.rows = [row for whole in bench.rows for row in _apart(whole)]


def _rows(bench: Bench, plain: TextToImagePipeline, compiled: Any, batch: int, steps: int) -> Row:
    """Return the quartiles of each arm by its name, and the operations of a call."""
    prompts, sampler = [f"a red ring, number {i}" for i in range(batch)], Sampler(steps)
    draws = {"official": theirs(plain, sampler), "ours": ours(plain, sampler)}
    if compiled is not None:
        draws["ours, compiled"] = ours(compiled, sampler)
    with torch.inference_mode() if compiled is None else torch.no_grad():
        arms = {name: partial(draw, prompts) for name, draw in draws.items()}
        found = bench.turns(arms)
        peak = bench.peak()
        with flop_counter() as counter:
            draws["ours"](prompts)
    return {"flops": int(counter.get_total_flops()), "peak_gib": peak, "arms": found}


def _apart(whole: Row) -> list[Row]:
    """Return a row of each arm of a batch size."""
    arms = whole.pop("arms", None)
    return (
        [whole] if arms is None else [{**whole, "arm": name, **own} for name, own in arms.items()]
    )
