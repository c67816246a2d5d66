"""Speed of our sampler beside diffusers' own `StableDiffusionPipeline.__call__`.

Method: both sides run the same modules of one `StableDiffusionPipeline` (same weights, dtype and
device) in inference mode, from prompts to pictures: text encoding, all denoising steps with
guidance at eta 0, and decoding. Prompts are all different, and each sample's noise comes from its
own generator, so that the pictures must agree; the largest difference of a pixel is checked. Their
safety checker and progress bar are off, and their scheduler is DDIM with the folder's own settings.
After a warm-up of each side the two take turns, the first of a pair being first in every other
repeat; the ratio (ours / theirs) is the median over pairs, given with its quartiles. Times are the
medians of each side, by the wall clock or, for a CPU shared with others, in processor time. A ratio
below 1 means that ours is faster.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --device cuda --batch-sizes 1 8
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.shapes import world
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler

TOLERANCE = 1e-3
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Draw = Callable[[list[str]], Tensor]
"""From prompts to pictures [B, 3, H, W] in [0, 1]."""


def ours(pipeline: TextToImagePipeline, sampler: Sampler) -> Draw:
    """Return our side: encode, walk, decode."""

    def draw(prompts: list[str]) -> Tensor:
        noise = generators(range(len(prompts)))
        condition = pipeline.encode({"index": torch.arange(len(prompts)), "prompt": prompts})
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = sampler.sample(pipeline, pipeline.process, x_1, condition, noise)
        return pipeline.decode(x_0, condition)

    return draw


def theirs(pipeline: TextToImagePipeline, sampler: Sampler) -> Draw:
    """Return diffusers' side, on the same modules."""
    plain = pipeline.diffusers
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    plain.set_progress_bar_config(disable=True)

    def draw(prompts: list[str]) -> Tensor:
        return plain(
            prompts,
            num_inference_steps=sampler.num_steps,
            guidance_scale=pipeline.guidance_scale,
            eta=sampler.eta,
            generator=generators(range(len(prompts))),
            output_type="pt",
        ).images

    return draw


def seconds(draw: Draw, prompts: list[str], clock: Callable[[], float]) -> float:
    """Return the time of one call, the device's work included."""
    start = clock()
    draw(prompts).cpu()
    return clock() - start


def compare(
    sides: Sequence[Draw], prompts: list[str], num_repeats: int, clock: Callable[[], float]
) -> str:
    """Return one row of the table, for one batch of prompts."""
    first, second = (draw(prompts) for draw in sides)  # also the warm-up
    difference = (first - second).abs().max().item()
    if not difference < TOLERANCE:
        raise SystemExit(f"pictures differ by up to {difference:g}: the two sides do not agree")
    times = []
    for repeat in range(num_repeats):
        order = (0, 1) if repeat % 2 else (1, 0)
        measured = {side: seconds(sides[side], prompts, clock) for side in order}
        times.append((measured[0], measured[1]))
    mine, other = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    ratios = [a / b for a, b in times]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (
        f"| {len(prompts)} | {other:.1f} | {mine:.1f} | {median:.3f} ({low:.3f}-{high:.3f}) "
        f"| {difference:.1e} |"
    )


def main() -> None:
    """Compare both sides at each batch size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="shapes", help="folder, hub id or embedded model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--num-repeats", type=int, default=20, help="pairs at each batch size")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    options = parser.parse_args()
    if options.num_repeats < 2:
        parser.error("--num-repeats must be at least 2, for quartiles")

    torch.set_num_threads(options.num_threads)
    pipeline = TextToImagePipeline(
        options.pretrained,
        guidance_scale=options.guidance_scale,
        decode_batch_size=max(options.batch_sizes),
    )
    pipeline.eval().to(options.device)
    pipeline.diffusers.to(options.device)
    sampler = Sampler(options.num_steps)
    sides = [ours(pipeline, sampler), theirs(pipeline, sampler)]
    texts = [prompt.text for prompt in world.split_prompts("test")]
    print("| batch size | diffusers, ms | ours, ms | ratio (quartiles) | largest difference |")
    print("|---|---|---|---|---|")
    with torch.inference_mode():
        for batch_size in options.batch_sizes:
            prompts = [texts[i % len(texts)] for i in range(batch_size)]
            row = compare(sides, prompts, options.num_repeats, CLOCKS[options.clock])
            print(row, flush=True)


if __name__ == "__main__":
    main()
