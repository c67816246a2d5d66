"""DRTune beside DRaFT-1, DRaFT-LV, AlignProp and ReFL at equal denoiser calls.

Method: `configs/experiments/shapes_drtune.yaml` is trained and tested once per reward, method and
seed, through the command line: the embedded model, LoRA of rank 8, 20 deterministic steps, batches
of 16, one optimiser and one learning rate for all, gradients clipped to norm 1. A run ends when it
has spent `--denoiser-calls` rows of the denoiser, so methods that stop early make more updates.
The seed sets the adapter's initialisation, all noise and the order of the prompts. Tuned and
reference samples share held-out prompts and noise; the gain is the mean over seeds of the paired
difference, its standard error that of the seeds' means. ShapesEval is the judge no gradient sees,
diversity the mean pixel distance within a prompt, kl the divergence from the reference's paths in
nats, per sample.

    python benchmarks/reward_gradient_methods.py --seeds 0 1 2 --workers 2

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import statistics
from itertools import product
from pathlib import Path

from command_line import Report, change, command_line, fit_and_test, print_table, run_all

CONFIG = "configs/experiments/shapes_drtune.yaml"
REWARDS = {
    "Symmetry": "Symmetry",
    "JPEG": "SmoothJPEGCompressibility",
    "CLIPScore": "CLIPScore",
}
METHODS = {
    "DRTune": {"class_path": "DRTune", "k": "2", "m": "8"},
    "DRaFT-1": {"class_path": "DRaFT", "k": "1"},
    "DRaFT-LV": {"class_path": "DRaFTLV", "num_copies": "2"},
    "AlignProp": {"class_path": "AlignProp"},
    "ReFL": {"class_path": "ReFL", "m": "5"},
}


def run(root: Path, reward: str, method: str, seed: int, extra: list[str]) -> Report:
    """Train and test once; return metrics.json."""
    options = ["--config", CONFIG]
    options += ["--reward", f"domains.text_to_image.rewards.{REWARDS[reward]}"]
    settings = dict(METHODS[method])
    options += ["--model.method", f"lit_rlft.core.gradient_plan.{settings.pop('class_path')}"]
    for key, value in settings.items():
        options += [f"--model.method.{key}", value]
    options += [*extra, "--model.seed", str(seed), "--data.seed", str(seed)]
    return fit_and_test(root, f"{reward} {method} {seed}", options)


def num_copies(method: str) -> int:
    """Return how often a method scores a sample."""
    return int(METHODS[method].get("num_copies", 1))


def row(reward: str, method: str, results: list[Report]) -> list[str]:
    """Return one line of the table."""
    own = REWARDS[reward]
    cells = [change(results, metric) for metric in (own, "ShapesEval", "diversity")]
    kl = statistics.mean(r["tuned"]["kl"]["mean"] for r in results)
    updates = statistics.mean(r["cost"]["reward_calls"] / num_copies(method) / 16 for r in results)
    return [reward, method, *cells, f"{kl:.3g}", f"{updates:.0f}"]


def main() -> None:
    """Run everything and print the table."""
    parser = command_line(__doc__, "runs/reward_gradient")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--denoiser-calls", type=int, default=8000)
    options, extra = parser.parse_known_args()
    extra += ["--trainer.callbacks.denoiser_calls", str(options.denoiser_calls)]
    arms = list(product(options.rewards, options.methods))
    jobs = [(*arm, seed) for seed in options.seeds for arm in arms]
    results = run_all(jobs, lambda job: run(options.root, *job, extra), options.workers)
    rows = [row(*arm, [results[(*arm, seed)] for seed in options.seeds]) for arm in arms]
    columns = ["reward", "method", "reward", "ShapesEval", "diversity", "kl", "updates"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
