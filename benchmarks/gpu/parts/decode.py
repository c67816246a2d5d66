"""Memory and time of decoding: several numbers of pictures at once, 512 and 1,024 pixels."""

from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from domains.text_to_image.pipeline import TextToImagePipeline

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Decode latents of Stable Diffusion 1.5's VAE in bfloat16."""
    pipeline = pipeline_of(bench, "sd")
    for pixels in bench.pick((512, 1024), (16, 32)):
        for batch in bench.pick((1, 4, 16, 32), (1, 2)):
            bench.case(
                {"pixels": pixels, "batch": batch},
                partial(_decode, bench, pipeline, pixels, batch),
            )


@torch.no_grad()
def _decode(bench: Bench, pipeline: TextToImagePipeline, pixels: int, batch: int) -> Row:
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    side = pixels // factor
    x = torch.randn(batch, pipeline.family.channels, side, side, device=bench.device)
    condition = pipeline.example().repeat(batch)
    pipeline.decode_batch_size = batch
    before = torch.cuda.memory_allocated() / 2**30 if bench.cuda else None
    found = bench.turns({"": lambda: pipeline.decode(x, condition)})[""]
    peak = bench.peak()
    extra = None if peak is None or before is None else peak - before
    return {**found, "peak_gib": peak, "beside_weights_gib": extra}
