r"""Sampling with a compiled denoiser beside a plain one.

Method: one pipeline as it is, one with `compile: blocks`, one with `compile: whole`, of the same
weights. Each samples the same prompts a few times before the clock starts, so that everything is
compiled; then they take turns, and a turn's ratio is the plain pipeline's seconds over the compiled
one's. The table has the median ratio with the smallest and largest, the seconds of the first call,
and the largest difference of the latents.

    python benchmarks/compiled.py --batch-size 16 --steps 10 --turns 7
    python benchmarks/compiled.py --pretrained stabilityai/stable-diffusion-xl-base-1.0 \
        --dtype bfloat16 --device cuda
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline

HOW = (None, "blocks", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pretrained", default="shapes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    made = {
        how: TextToImagePipeline(
            args.pretrained, frozen_dtype=args.dtype, compile=how, guidance_scale=3.0
        ).to(args.device)
        for how in HOW
    }
    first, latents = {}, {}
    for how, pipeline in made.items():
        first[how], latents[how] = timed(pipeline, args.batch_size, args.steps)
        timed(pipeline, args.batch_size, args.steps)
    seconds: dict[str | None, list[float]] = {how: [] for how in HOW}
    for turn in range(args.turns):
        for how in HOW[turn % 3 :] + HOW[: turn % 3]:
            seconds[how].append(timed(made[how], args.batch_size, args.steps)[0])
    print(f"{args.pretrained}, {args.batch_size} x {args.steps} steps, {args.device}, {args.dtype}")
    print("compile   first call   seconds   plain / compiled        largest difference")
    for how in HOW:
        ratios = [a / b for a, b in zip(seconds[None], seconds[how], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        gap = float((latents[how] - latents[None]).abs().max())
        median = statistics.median(seconds[how])
        print(f"{how!s:8} {first[how]:10.1f} s {median:8.2f}   {spread:22}  {gap:.1e}")


@torch.no_grad()
def timed(pipeline: TextToImagePipeline, size: int, steps: int) -> tuple[float, Tensor]:
    """Return the seconds of a few Euler-like calls of the guided denoiser, and what came out."""
    condition = pipeline.encode({"prompt": [f"a red ring {i}" for i in range(size)]})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(pipeline.blank(condition).shape, generator=generator).to(pipeline.device)
    started = now()
    for t in torch.linspace(1, 1 / steps, steps, device=pipeline.device):
        x = x - 0.1 * pipeline(x, t.expand(size), condition)
    return now() - started, x.float().cpu()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    main()
