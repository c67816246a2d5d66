r"""Which steps of an image model's sampler have an inverse, and does iteration find it?

Method: the deterministic sampler of n steps is walked from noise to pictures. At every state that
it went through the Lipschitz constant of the inversion's own iteration is measured, the largest
singular value q of the Jacobian of x_t -> x_t + (x_s - F(x_t)) / gamma, by power iteration. Below 1
everywhere the step has one inverse and plain iteration finds it. Then

- the pictures are inverted again: root mean square of the difference to the noise they came from,
  which says whether the inverse found is the one;
- real pictures are inverted: the residual says whether there is any noise that leads to them, the
  mean square of the noise whether it is like N(0, 1);
- beside it, the root mean square of the singular values of the whole map's Jacobian, and the share
  of directions in which real pictures vary less than the level t of the last step. That step takes
  them to nearly nothing: of a direction with variance c an exact model keeps
  alpha c / (alpha^2 c + sigma^2). Directions are those of a discrete cosine transform.

    python -m benchmarks.step_inverse run --model digits --out inverse_digits.jsonl
    python -m benchmarks.step_inverse run --model runs/patches/base/tuned \
        --pictures runs/patches/held_out.npy --out inverse_patches.jsonl
    python -m benchmarks.step_inverse table --out inverse_patches.jsonl

One line of JSON per number of steps; what is there is kept.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from scipy.fft import dctn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step_jacobian import Map, Walk, largest_singular_value, mean_square
from domains.image.pipeline import ImagePipeline
from domains.image.sources import Arrays, Digits
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.runs.lines import append_lines, read_lines

STEPS = (1, 2, 3, 4, 8, 16, 32)
MOST = 1000
"""Real pictures whose deviations are taken."""


def iteration(walked: Walk, i: int) -> Map:
    """Return the fixed-point iteration that undoes step i, which leads to the walk's next state."""
    process, x_s = walked.process, walked.states[i + 1]
    t, s = (level.expand(len(x_s)) for level in (walked.steps.t[i], walked.steps.s[i]))

    def function(x_t: Tensor) -> Tensor:
        prediction = walked.denoiser(x_t, t, walked.condition)
        return tensor_of(process.inverted(prediction, x_t, x_s, t, s))

    return function


def contraction(walked: Walk, i: int, num_iterations: int, noise: torch.Generator) -> float:
    """Return the Lipschitz constant of step i's iteration at the walk's states, the largest."""
    x = walked.states[i]
    return float(largest_singular_value(iteration(walked, i), x, num_iterations, noise).max())


@torch.no_grad()
def returned(
    pipeline: Pipeline, x_0: Tensor, condition: Condition, num_steps: int, solver: FixedPoint
) -> dict[str, Any]:
    """Invert pictures; return their noise and how well it leads to them."""
    sampler = Sampler(num_steps)
    found = sampler.invert(pipeline, pipeline.process, x_0, condition, solver)
    x_1 = tensor_of(found.x_1)
    finite = found.residuals.nan_to_num(nan=torch.inf)
    again = sampler.sample(pipeline, pipeline.process, x_1, condition)
    return {
        "x_1": x_1,
        "residual": float(finite.max()),
        "unconverged": float((finite > solver.tolerance).float().mean()),
        "noise_power": float(x_1.square().mean()),
        "picture_error": float((tensor_of(again) - x_0).square().mean().sqrt()),
        "iterations": float(found.iterations.double().mean()) / num_steps,
    }


def deviations(pictures: Tensor) -> Tensor:
    """Return the standard deviation of each coefficient of a cosine transform of [n, C, H, W]."""
    coefficients = dctn(pictures.double().numpy(), axes=(2, 3), norm="ortho")
    return torch.from_numpy(coefficients).flatten(1).std(dim=0)


def run(
    pipeline: ImagePipeline, pictures: Tensor, num_steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one number of steps."""
    real = pictures[: options.num]
    start, rows = time.process_time(), range(len(real))
    condition = pipeline.encode({"index": rows})
    x_1 = tensor_of(pipeline.process.prior(pipeline.blank(condition)).sample(generators(rows)))
    walked = Walk(pipeline, pipeline.process, x_1, condition, num_steps)
    noise, few = torch.Generator().manual_seed(0), slice(options.few)
    own = (x_1[few], condition.index(few))
    small = Walk(pipeline, pipeline.process, *own, num_steps)
    picked = sorted({0, num_steps // 2, num_steps - 2, num_steps - 1} & set(range(num_steps)))
    with sdpa_kernel(SDPBackend.MATH):
        factors = {i: contraction(small, i, options.iterations, noise) for i in picked}
    whole = mean_square(small.last(num_steps), small.states[0], 1, noise).mean().sqrt()
    solver = FixedPoint(options.tolerance, options.max_iterations)
    drawn = returned(pipeline, walked.states[-1], condition, num_steps, solver)
    data = returned(pipeline, real, condition, num_steps, solver)
    error = float((drawn.pop("x_1") - x_1).square().mean().sqrt())
    data.pop("x_1")
    return {
        "model": options.model,
        "num_steps": num_steps,
        "num": len(real),
        "t": [float(t) for t in walked.steps.t],
        "contraction": factors,
        "map_rms": float(whole),
        "flat": float((deviations(pictures) < float(walked.steps.t[-1])).double().mean()),
        "noise_error": error,
        "drawn": drawn,
        "real": data,
        "processor_seconds": time.process_time() - start,
    }


def sweep(options: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    pipeline = ImagePipeline(options.model).eval().requires_grad_(False)
    source = Arrays(str(options.pictures)) if options.pictures else Digits()
    images = torch.from_numpy(source.load().pixels[:MOST].copy())
    pictures = tensor_of(pipeline.states({"image": images}))
    known = {(line["model"], line["num_steps"]) for line in read_lines(options.out)}
    for num_steps in options.steps:
        if (options.model, num_steps) in known:
            continue
        result = run(pipeline, pictures, num_steps, options)
        append_lines(options.out, json.dumps(result) + "\n")
        print(f"{num_steps} steps: {result['processor_seconds']:.0f} s", flush=True)


def table(out: Path) -> None:
    """Print a row per number of steps."""
    head = (
        "q of the first step",
        "middle",
        "last but one",
        "last",
        "map: root mean square",
        "flat",
    )
    rest = ("noise returns within", "not converged", "real pictures: residual", "not converged")
    print(f"| steps | {' | '.join((*head, *rest))} | picture error | noise power |")
    print("| --- " * (len(head) + len(rest) + 3) + "|")
    for line in sorted(read_lines(out), key=lambda line: line["num_steps"]):
        n, factors = line["num_steps"], line["contraction"]
        places = (0, n // 2, n - 2, n - 1)
        own = [f"{factors[str(i)]:.2f}" if i in range(n) else "" for i in places]
        drawn, real = line["drawn"], line["real"]
        own += [f"{line['map_rms']:.3f}", f"{line['flat']:.0%}", f"{line['noise_error']:.2g}"]
        own += [f"{drawn['unconverged']:.0%}", f"{real['residual']:.2g}"]
        own += [f"{real['unconverged']:.0%}", f"{real['picture_error']:.2g}"]
        print(f"| {n} | {' | '.join(own)} | {real['noise_power']:.2f} |")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--model", default="digits", help="what ImagePipeline takes")
    parser.add_argument("--pictures", type=Path, help="array file of real pictures; None: digits")
    parser.add_argument("--out", type=Path, default=Path("step_inverse.jsonl"))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--num", type=int, default=32, help="pictures that are inverted")
    parser.add_argument("--few", type=int, default=4, help="of which Jacobians are taken")
    parser.add_argument("--iterations", type=int, default=8, help="of the power iteration")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--max-iterations", type=int, default=40)
    options = parser.parse_args()
    if options.what == "run":
        sweep(options)
    else:
        table(options.out)


if __name__ == "__main__":
    main()
