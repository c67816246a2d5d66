r"""Where does a sampler's step expand? Its Jacobian's singular values, and reward gradients by K.

Method: a model with a fresh LoRA (rank 8) walks T deterministic steps x_t -> x_s = F_t(x_t). Then
one sweep back from x_0 finds, at every step,

- the singular values of dx_s / dx_t: the largest by power iteration, of which the best vector of
  all iterates is taken (a lower bound that rises with `--iterations`); the root of the mean square
  by Hutchinson's estimator, |J' v|^2 / d for normal v;
- the same root mean square of the product of all Jacobians from there to x_0, and the gain of the
  reward gradient through that product;
- what an input stop-gradient leaves of the Jacobian: the factor of x_t in F, a scalar, and the
  product of these;
- the norm of the reward's gradient to the adapter when the last K steps carry gradient, with
  attached inputs (DRaFT-K) and with detached ones, and when K equally spaced ones do with detached
  inputs (DRTune, averaged over the offsets that fit).

Everything is of a batch of prompts and noise that the seed decides; nothing is trained. The reward
is Symmetry. "shapes" is the embedded text-to-image model, trained at 8 x 8 latents and run at
others too; "random" has Stable Diffusion 1.5's U-Net a tenth as wide, with new weights, beside the
text encoder and VAE of "shapes"; "pictures" is the embedded flow on 32 x 32 pixels; "sd15" has the
size of Stable Diffusion 1.5, with random weights or those of `--pretrained`, and wants a GPU.

    python -m benchmarks.step_jacobian run --out step_jacobian.jsonl
    python -m benchmarks.step_jacobian run --out sd15.jsonl --device cuda --cells sd15:64
    python -m benchmarks.step_jacobian table --out step_jacobian.jsonl
    python -m benchmarks.step_jacobian figure --out step_jacobian.jsonl --figure jacobian.png

A cell is model:size of the latents[:guidance]. One line of JSON per cell and seed; what is there is
kept, so that an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from scipy import stats
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.aggregates import Estimate
from domains.image.pipeline import ImagePipeline
from domains.text_to_image import EMBEDDED
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from domains.text_to_image.shapes.world import split_prompts
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.process.gaussian import Linear
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Denoiser, Sampler, walk
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.reference import LoRA
from lit_rlft.runs.lines import append_lines, read_lines

STEPS = 25
MODELS = ("shapes", "random", "pictures", "sd15")
CELLS = ("shapes:8", "shapes:16", "shapes:32", "random:32", "random:64", "pictures:32")

Map = Callable[[Tensor], Tensor]
"""From a batch of states to another, each sample by itself."""


@dataclass(frozen=True)
class Cell:
    """What is measured in one run.

    Attributes:
        model: One of `MODELS`.
        size: Height and width of the latents, or of the pixels of "pictures".
        guidance: Scale of classifier-free guidance; 1 is none.
        seed: Of the noise, the prompts and new weights.
    """

    model: str
    size: int
    guidance: float
    seed: int

    @classmethod
    def of(cls, text: str, seed: int) -> "Cell":
        """Read model:size[:guidance].

        Raises:
            SystemExit: It is something else.
        """
        model, _, rest = text.partition(":")
        size, _, guidance = rest.partition(":")
        if model not in MODELS or not size.isdigit():
            known = ", ".join(MODELS)
            raise SystemExit(f"--cells: {text!r} is not model:size[:guidance]; models are {known}")
        usual = 1.0 if model == "pictures" else 7.5
        return cls(model, int(size), float(guidance or usual), seed)

    @property
    def title(self) -> str:
        """For tables and figures."""
        guided = f", guidance {self.guidance:g}" if self.guidance > 1 else ""
        return f"{self.model} {self.size} x {self.size}{guided}"


@torch.no_grad()
def largest_singular_value(
    function: Map, x: Tensor, num_iterations: int, generator: torch.Generator
) -> Tensor:
    """Return the largest singular value of each sample's Jacobian at x [B, ...], [B].

    Power iteration on J'J. Its iterates are made orthonormal, and of all their combinations the
    one that J stretches most is taken: a lower bound, exact after as many iterations as dimensions.
    """
    y, pull = torch.func.vjp(function, x)
    # u -> J'u is linear, so that v -> J v is its own derivative pulled back.
    _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
    basis, images = [_unit(start.flatten(1))], []
    for _ in range(num_iterations):
        (image,) = push(basis[-1].view_as(x))
        images.append(image.flatten(1))
        (back,) = pull(image)
        rest = back.flatten(1)
        for _ in range(2):  # once leaves what rounding adds
            for known in basis:
                rest = rest - (rest * known).sum(dim=1, keepdim=True) * known
        # Where nothing but rounding is left the basis is complete.
        least = 100 * torch.finfo(x.dtype).eps * back.flatten(1).norm(dim=1, keepdim=True)
        left = rest.norm(dim=1, keepdim=True) > least
        basis.append(_unit(rest) * left)
    return torch.linalg.svdvals(torch.stack(images, dim=2))[:, 0]


@torch.no_grad()
def mean_square(function: Map, x: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Return the mean squared singular value of each sample's Jacobian at x [B, ...], [B].

    Hutchinson's estimate: |J' v|^2 / d with normal v of d numbers has it for its mean.
    """
    _, pull = torch.func.vjp(function, x)
    values = []
    for _ in range(num_draws):
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
        values.append(pull(v)[0].flatten(1).square().mean(dim=1))
    return torch.stack(values).mean(dim=0)


def _unit(vectors: Tensor) -> Tensor:
    tiny = torch.finfo(vectors.dtype).tiny
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=tiny)


class Walk:
    """T steps of the deterministic sampler, and the states that they went through.

    Args:
        denoiser: Predicts.
        process: Gives the steps; without a bound on x_0.
        x_1: [B, ...].
        condition: B rows.
        num_steps: T.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: GaussianProcess,
        x_1: Tensor,
        condition: Condition,
        num_steps: int,
    ) -> None:
        self.denoiser, self.process, self.condition = denoiser, process, condition
        times, ends = process.times(num_steps), process.ends(num_steps)
        self.steps = process.steps(times, ends, 0.0, x_1)
        with torch.no_grad():
            walked = walk(denoiser, process, x_1, condition, times, 0.0, None, ends)
            self.states = [tensor_of(x) for _, x in walked]

    def __len__(self) -> int:
        """Return T."""
        return len(self.steps)

    def step(self, i: int) -> Map:
        """Return F of step i, counted from the noise."""
        t, row = self.steps.levels(i, len(self.condition)), self.steps.row(i)

        def function(x_t: Tensor) -> Tensor:
            prediction = self.denoiser(x_t, t, self.condition)
            return tensor_of(self.process.step(prediction, x_t, row).mean)

        return function

    def last(self, num_steps: int) -> Map:
        """Return the composition of the last steps."""

        def function(x: Tensor) -> Tensor:
            for i in range(len(self) - num_steps, len(self)):
                x = self.step(i)(x)
            return x

        return function

    def detached(self, i: int) -> float:
        """Return the factor of x_t in step i, all that is left where the prediction is detached."""
        return float(Linear(*tensor_of(self.steps.row(i)).unbind(dim=-1)).of_x)


@dataclass
class Pulled:
    """What a sweep back from x_0 found, by step from the noise on; values are means over samples.

    Attributes:
        rms: Root mean square of the singular values of the product from there to x_0.
        along_reward: Factor of the reward gradient's norm in the product.
        attached: Norm of the gradient to the weights through the last K steps, K from 1 on.
        detached: The same with detached inputs.
        spaced: That of K equally spaced steps with detached inputs, by K.
    """

    rms: list[float]
    along_reward: list[float]
    attached: list[float]
    detached: list[float]
    spaced: dict[int, float]


def pulled(
    walked: Walk, weights: Sequence[Tensor], gradient: Tensor, generator: torch.Generator
) -> Pulled:
    """Sweep back through a walk.

    Args:
        walked: Its denoiser has the weights.
        weights: That carry gradient.
        gradient: Of the loss of the batch to x_0, [B, ...].
        generator: Of a random vector.
    """
    own, cut = gradient, gradient
    random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient)
    start, size = gradient.flatten(1).norm(dim=1), random[0].numel()
    through, parts = torch.zeros(()), []
    found = Pulled([], [], [], [], {})
    for i in reversed(range(len(walked))):
        x = walked.states[i].detach().requires_grad_()
        y = walked.step(i)(x)
        pull = torch.autograd.grad(y, [x, *weights], own, retain_graph=True)
        aside = torch.autograd.grad(y, weights, cut, retain_graph=True)
        (random,) = torch.autograd.grad(y, x, random)
        own, cut = pull[0], walked.detached(i) * cut
        through = through + _flat(pull[1:])
        parts.append(_flat(aside))
        found.attached.append(float(through.norm()))
        found.detached.append(float(torch.stack(parts).sum(dim=0).norm()))
        found.rms.insert(0, float((random.flatten(1).square().sum(dim=1) / size).mean().sqrt()))
        found.along_reward.insert(0, float((own.flatten(1).norm(dim=1) / start).mean()))
    found.spaced = _spaced(torch.stack(parts))
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _spaced(parts: Tensor) -> dict[int, float]:
    """Return the norm of K equally spaced rows' sum, geometric mean over offsets, by K."""
    num, found = len(parts), {}
    for k in (1, 2, 5, 12, 25):
        if k > num:
            continue
        gap = num // k
        norms = [
            float(parts[offset : offset + (k - 1) * gap + 1 : gap].sum(dim=0).norm())
            for offset in range(num - (k - 1) * gap)
        ]
        found[k] = statistics.geometric_mean(norms)
    return found


def pipeline_of(cell: Cell, pretrained: str | None, device: torch.device) -> Pipeline:
    """Return the pipeline of a cell."""
    if cell.model == "pictures":
        made: Pipeline = ImagePipeline(pretrained or "shapes")
        (height, _) = made.image_size
        if height != cell.size:
            raise SystemExit(f"--cells: the pictures are {height} pixels high, not {cell.size}")
        return made.to(device)
    pixels = {name: 8 * cell.size for name in ("height", "width")}
    if cell.model == "sd15" and pretrained is None:
        from benchmarks.gpu.bench import Bench
        from benchmarks.gpu.models import pipeline_of as random_weights

        bench = Bench(device, tiny=device.type == "cpu", seconds=0)
        settings = {"guidance_scale": cell.guidance, **pixels}
        return random_weights(bench, "sd", torch.float32, **settings)
    with tempfile.TemporaryDirectory() as folder:
        source = pretrained or "shapes"
        if cell.model == "random":
            source = str(_random(Path(folder) / "random", cell))
        own = TextToImagePipeline(source, guidance_scale=cell.guidance, **pixels)
    return own.to(device)


def _random(folder: Path, cell: Cell) -> Path:
    """Write "shapes" with a new U-Net of Stable Diffusion 1.5's kind; return the folder."""
    shutil.copytree(EMBEDDED / "shapes", folder, ignore=shutil.ignore_patterns("unet"))
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        network = UNet2DConditionModel(
            sample_size=cell.size,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=2,
            cross_attention_dim=128,
        )
    network.save_pretrained(folder / "unet")
    return folder


def tuner_of(pipeline: Pipeline) -> RewardGradient:
    """Return the pipeline with a fresh adapter, set up."""
    method, lora = DRTune(1, m=1), LoRA(8, 8)
    tuner = RewardGradient(
        pipeline, Symmetry(), method=method, lora=lora, sampler=Sampler(STEPS), seed=0
    )
    tuner.setup("fit")
    return tuner


def condition_of(pipeline: Pipeline, rows: range) -> Condition:
    """Return a condition a row: shapes' training prompts, far apart in their order."""
    prompts = [prompt.text for prompt in split_prompts("train")]
    chosen = [prompts[37 * i % len(prompts)] for i in rows]
    return pipeline.encode({"index": torch.tensor(rows), "prompt": chosen})


def reward_gradient(tuner: RewardGradient, x_0: Tensor, condition: Condition) -> Tensor:
    """Return the gradient of minus the mean reward to x_0."""
    x = x_0.detach().requires_grad_()
    rewards = tuner.reward(tuner.pipeline.decode(x, condition), condition)
    (gradient,) = torch.autograd.grad(-rewards.mean(), x)
    return gradient


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell."""
    start, device = time.process_time(), torch.device(options.device)
    tuner = tuner_of(pipeline_of(cell, options.pretrained, device))
    pipeline = tuner.pipeline
    rows = range(cell.seed * options.batch_size, (cell.seed + 1) * options.batch_size)
    condition = condition_of(pipeline, rows)
    x_1 = tensor_of(tuner.reference_prior(condition).sample(generators(rows)))
    walked = Walk(pipeline, pipeline.process, x_1, condition, STEPS)
    noise = torch.Generator().manual_seed(cell.seed)
    gradient = reward_gradient(tuner, walked.states[-1], condition)
    weights = [p for p in tuner.trainable().parameters() if p.requires_grad]
    found = asdict(pulled(walked, weights, gradient, noise))
    measured = [*range(0, STEPS - 1, options.every), STEPS - 1]
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
        top = {i: largest(walked.step(i), walked.states[i], options, noise) for i in measured}
        products = {
            k: largest(walked.last(k), walked.states[STEPS - k], options, noise)
            for k in options.products
        }
    rms = {i: _root(mean_square(walked.step(i), walked.states[i], 2, noise)) for i in measured}
    return asdict(cell) | {
        "batch_size": options.batch_size,
        "iterations": options.iterations,
        "device": str(device),
        "pretrained": options.pretrained,
        "t": [float(t) for t in walked.steps.t],
        "detached_factor": [walked.detached(i) for i in range(STEPS)],
        "step_largest": top,
        "step_rms": rms,
        "product_largest": products,
        **{f"product_{name}": found[name] for name in ("rms", "along_reward")},
        **{f"norm_{name}": found[name] for name in ("attached", "detached", "spaced")},
        "processor_seconds": time.process_time() - start,
    }


def largest(
    function: Map, x: Tensor, options: argparse.Namespace, noise: torch.Generator
) -> list[float]:
    """Return the largest singular value of each sample's Jacobian."""
    return largest_singular_value(function, x, options.iterations, noise).tolist()


def _root(values: Tensor) -> float:
    return float(values.mean().sqrt())


def sweep(options: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    names = Cell.__dataclass_fields__
    known = {Cell(**{name: line[name] for name in names}) for line in read_lines(options.out)}
    for seed in options.seeds:
        for cell in (Cell.of(text, seed) for text in options.cells or CELLS):
            if cell in known:
                continue
            result = run(cell, options)
            append_lines(options.out, json.dumps(result) + "\n")
            print(f"{cell}: {result['processor_seconds']:.0f} s", flush=True)


def chosen(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of `--cells` in their order, or all."""
    groups = grouped(list(read_lines(options.out)))
    titles = [Cell.of(text, 0).title for text in options.cells] if options.cells else groups
    return [line for title in titles for line in groups[title]]


def grouped(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of all seeds, by the cell's title."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[Cell(**{name: line[name] for name in Cell.__dataclass_fields__}).title].append(line)
    return groups


def mean_and_range(values: Sequence[float]) -> str:
    """Return the geometric mean over seeds, with the least and the most where they differ."""
    text, low, high = (
        f"{x:.3g}" for x in (statistics.geometric_mean(values), min(values), max(values))
    )
    return text if low == high else f"{text} ({low} to {high})"


def ratio_table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the attached gradient's norm over the detached one's, by K."""
    counts = [k for k in map(int, lines[0]["norm_spaced"]) if k > 1]  # one step has no earlier one
    head = [*(f"K = {k}" for k in counts), f"largest at K = {counts[-1]}"]
    print(f"| model | seeds | {' | '.join(head)} |")
    print("| --- " * (len(head) + 2) + "|")
    for title, own in grouped(lines).items():
        ratios = [
            [line["norm_attached"][k - 1] / line["norm_detached"][k - 1] for line in own]
            for k in counts
        ]
        cells = [*(f"{geometric(values):.2f}" for values in ratios), f"{max(ratios[-1]):.3g}"]
        print(f"| {title} | {len(own)} | {' | '.join(cells)} |")


def geometric(values: Sequence[float]) -> Estimate:
    """Return the geometric mean of positive values, with the 95 % interval of Student's t."""
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Estimate(math.exp(mean), math.nan, math.nan)
    reach = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    return Estimate(*(math.exp(mean + side * reach) for side in (0, -1, 1)))


def jacobian_table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the singular values by level, and those of products from there to x_0."""
    head = ("largest", "root mean square", "detached", "product: largest", "root mean square")
    print(f"| model | t | {' | '.join(head)} | of the reward gradient | detached |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, own in grouped(lines).items():
        for i in map(int, own[0]["step_largest"]):
            step = [
                [max(line["step_largest"][str(i)]) for line in own],
                [line["step_rms"][str(i)] for line in own],
                [line["detached_factor"][i] for line in own],
            ]
            whole = [line["product_largest"].get(str(STEPS - i)) for line in own]
            product = [
                [line["product_rms"][i] for line in own],
                [line["product_along_reward"][i] for line in own],
                [product_of(line["detached_factor"][i:]) for line in own],
            ]
            largest = mean_and_range([max(v) for v in whole]) if all(whole) else ""
            cells = [*map(mean_and_range, step), largest, *map(mean_and_range, product)]
            print(f"| {title} | {own[0]['t'][i]:.3f} | {' | '.join(cells)} |")


def product_of(values: Sequence[float]) -> float:
    """Return the product of numbers."""
    return float(torch.tensor(values, dtype=torch.float64).prod())


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot singular values by level, and gradient norms by K, a column per model."""
    import matplotlib.pyplot as plt

    groups = grouped(lines)
    size = (3.4 * len(groups), 6.5)
    figure, panels = plt.subplots(2, len(groups), figsize=size, layout="constrained", squeeze=False)
    for (title, own), (above, below) in zip(groups.items(), panels.T, strict=True):
        levels, places = own[0]["t"], list(map(int, own[0]["step_largest"]))
        curves = {
            "largest": [[max(v) for v in line["step_largest"].values()] for line in own],
            "root mean square": [list(line["step_rms"].values()) for line in own],
        }
        for name, curve in curves.items():
            above.plot([levels[i] for i in places], _mean(curve), "o-", label=name)
        factors = _mean([line["detached_factor"] for line in own])
        above.plot(levels, factors, "k:", label="detached: factor of x_t")
        above.set(title=title, xlabel="t", ylabel="singular values of a step", yscale="log")
        norms = {"attached": "last K attached: DRaFT-K", "detached": "last K detached"}
        for arm, label in norms.items():
            values = [line[f"norm_{arm}"] for line in own]
            below.plot(range(1, STEPS + 1), _mean(values), label=label)
        counts = sorted(map(int, own[0]["norm_spaced"]))
        spaced = [[line["norm_spaced"][str(k)] for k in counts] for line in own]
        below.plot(counts, _mean(spaced), "ks", ms=4, label="DRTune-K: spaced, detached")
        below.set(xlabel=f"steps with gradient K of {STEPS}", ylabel="gradient norm")
        below.set(xscale="log", yscale="log")
    for row in panels:
        row[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the geometric mean over seeds."""
    return [statistics.geometric_mean(values) for values in zip(*rows, strict=True)]


def main() -> None:
    """Run the cells, print their tables, or draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "table", "figure"])
    parser.add_argument("--out", type=Path, default=Path("step_jacobian.jsonl"))
    parser.add_argument("--cells", nargs="+", help="model:size[:guidance]; a table has all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=6, help="of the power iteration")
    parser.add_argument("--every", type=int, default=4, help="steps between singular values")
    parser.add_argument("--products", type=int, nargs="*", default=[], help="of the last K steps")
    parser.add_argument("--pretrained", help="folder or hub id that takes the model's place")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, default=Path("docs/step_jacobian.png"))
    options = parser.parse_args()
    if options.what == "run":
        sweep(options)
    elif options.what == "figure":
        draw(chosen(options), options.figure)
    else:
        lines = chosen(options)
        ratio_table(lines)
        jacobian_table(lines)


if __name__ == "__main__":
    main()
