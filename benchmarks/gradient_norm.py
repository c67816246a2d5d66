"""Growth of the gradient norm with the number of trained steps, with and without detached inputs.

Method: the embedded model with a fresh LoRA (rank 8), T = 25 deterministic steps, reward Symmetry,
at several guidance scales, since guidance scales the denoiser's Jacobian. For each K, DRTune's K
equally spaced steps are drawn without an early stop, once per batch, and the norm of the reward's
gradient with respect to the adapter is taken on the same batches, prompts and noise, once with the
denoiser's input detached and once without. Nothing is trained. The figure shows the geometric mean
over batches, with their range.

    pip install -e ".[benchmarks]"
    python benchmarks/gradient_norm.py --figure docs/gradient_norm.png
"""

import argparse
import statistics
from collections import defaultdict
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from domains.text_to_image.shapes.world import split_prompts
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA

STEPS, COUNTS = 25, (1, 2, 5, 12, 25)
Results = dict[tuple[float, bool], dict[int, list[float]]]
ARMS = {True: "DRTune: inputs detached", False: "inputs attached"}


def tuner(k: int, detach_input: bool, guidance: float) -> RewardGradient:
    """Return the embedded model under DRTune with K trained steps."""
    pipeline = TextToImagePipeline("shapes", guidance_scale=guidance)
    method = DRTune(k, m=1, detach_input=detach_input)
    made = RewardGradient(
        pipeline,
        Symmetry(),
        method=method,
        lora=LoRA(8, 8),
        sampler=Sampler(STEPS),
        gradient_checkpointing="steps",
    )
    made.setup("fit")
    return made


def norms(model: RewardGradient, num_batches: int, batch_size: int) -> list[float]:
    """Return the gradient's norm on each batch."""
    prompts = [prompt.text for prompt in split_prompts("train")]
    found = []
    for batch in range(num_batches):
        model.num_updates = batch  # draws the offset of the trained steps
        rows = range(batch * batch_size, (batch + 1) * batch_size)
        columns = {
            "index": torch.tensor(rows),
            "prompt": [prompts[37 * i % len(prompts)] for i in rows],
        }
        experience = Experience({}, model.pipeline.encode(columns), list(rows))
        losses, _ = model.loss(experience, generators(rows))
        parameters = [p for p in model.trainable().parameters() if p.requires_grad]
        grads = torch.autograd.grad(losses.mean(), parameters)
        found.append(float(torch.nn.utils.get_total_norm(grads)))
    return found


def draw(results: Results, path: Path) -> None:
    """Plot the norms against K, a panel per guidance scale."""
    scales = sorted({guidance for guidance, _ in results})
    size = (4 * len(scales), 3.5)
    figure, panels = plt.subplots(1, len(scales), figsize=size, layout="constrained", squeeze=False)
    for guidance, axes in zip(scales, panels[0], strict=True):
        for detached, label in ARMS.items():
            by_count = results[guidance, detached]
            counts = list(by_count)
            middle = [statistics.geometric_mean(by_count[k]) for k in counts]
            axes.plot(counts, middle, "o-", label=label)
            low, high = ([pick(by_count[k]) for k in counts] for pick in (min, max))
            axes.fill_between(counts, low, high, alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel=f"trained steps K of {STEPS}")
        axes.set(ylabel="gradient norm", title=f"guidance {guidance:g}")
        axes.set_xticks(COUNTS, [str(k) for k in COUNTS])
        axes.minorticks_off()
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=Path("docs/gradient_norm.png"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[7.5, 20.0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    results: Results = defaultdict(dict)
    print("| guidance | K | " + " | ".join(ARMS.values()) + " | ratio |\n|---|---|---|---|---|")
    for guidance, k in product(options.guidance, COUNTS):
        means = []
        for detached in ARMS:
            model = tuner(k, detached, guidance)
            found = norms(model, options.batches, options.batch_size)
            results[guidance, detached][k] = found
            means.append(statistics.geometric_mean(found))
        numbers = " | ".join(f"{value:.3g}" for value in (*means, means[1] / means[0]))
        print(f"| {guidance:g} | {k} | {numbers} |", flush=True)
    draw(results, options.figure)


if __name__ == "__main__":
    main()
