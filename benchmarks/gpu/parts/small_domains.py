"""Sampling of 1,024 layouts and molecules with the embedded models."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Row
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Draw them in single precision, from noise of their own, all in one batch.

    Plain, and with the network's kernels recorded as CUDA graphs.
    """
    made: dict[str, Callable[..., Pipeline]] = {
        "layout": LayoutPipeline,
        "molecule": MoleculePipeline,
    }
    for name, kind in made.items():
        bench.case({"domain": name}, partial(_draw, bench, kind))
        if bench.cuda:
            graphs = partial(kind, compile="graphs")
            bench.case({"domain": f"{name}, graphs"}, partial(_draw, bench, graphs))


@torch.no_grad()
def _draw(bench: Bench, kind: Callable[..., Pipeline]) -> Row:
    samples, steps = bench.pick((1024, 50), (4, 2))
    pipeline = kind()
    pipeline.eval().to(bench.device)
    condition = pipeline.example().repeat(samples)
    sampler = Sampler(steps, 1.0)

    def draw() -> None:
        noise = generators(range(samples))
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        sampler.sample(pipeline, pipeline.process, x_1, condition, noise)

    found = bench.turns({"": draw})[""]
    return {**found, "samples": samples, "steps": steps, "peak_gib": bench.peak()}
