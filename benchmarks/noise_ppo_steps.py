"""Gain of Noise PPO over the base against the sampler's steps, trained at each; a control beside.

Method: `configs/algorithms/noise_ppo.yaml` on the embedded model without guidance is trained and
tested through the command line at each number of deterministic steps: 16 rounds of 96 prompts with
4 samples each, 6,144 reward calls. The control learns one prior for all prompts
(`condition_free`); "average" reads the plain average of the text's tokens instead of attending to
them. Tuned and reference samples share held-out prompts and noise. With one seed the error is that
of the paired differences over samples, else that of the seeds' means. The ceiling is best of 4
noises (`--model.best_of 4`, four more samples per sample of the test); "kept" is the gain of the
runs that see the prompt as a share of the ceiling's. With `--prompts structured` all prompts are
about positions and counts.

    python benchmarks/noise_ppo_steps.py --model.best_of 4 --plot docs/noise_ppo_steps.png

Finished runs are kept, so an interrupted benchmark goes on where it stopped, and only those that
are there are in the table with `--finished`.
"""

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from command_line import (
    Report,
    command_line,
    fit_and_test,
    folder_of,
    print_table,
    run_all,
    standard_error,
)

from domains.text_to_image.shapes.world import Split, split_prompts

METRIC, BEST = "ShapesEval", "best_of_4_noise"
POLICIES = {
    "prompt-conditioned": ["--model.attention_heads", "8"],
    "average": ["--model.attention_heads", "0"],
    "prompt-independent": ["--model.condition_free", "true"],
}
STRUCTURED = ("position", "counting")
OPTIONS = [
    *("--config", "configs/domains/shapes.yaml", "--pipeline.guidance_scale", "1.0"),
    *("--config", "configs/algorithms/noise_ppo.yaml", "--model.num_candidates", "4"),
]
NUM_TRAIN, NUM_TEST = 1536, 192
LOADING = ["--data.batch_size", "96", "--data.eval_batch_size", "48"]


def data(root: Path, prompts: str) -> list[str]:
    """Return the options of the data; structured prompts are written to files, tasks in turns."""
    if prompts == "all":
        sizes = ["--data.num_train_prompts", str(NUM_TRAIN), "--data.num_test_prompts"]
        return [*LOADING, *sizes, str(NUM_TEST)]
    options = ["--data", "PromptData", *LOADING]
    parts: dict[Split, int] = {"train": NUM_TRAIN, "val": 48, "test": NUM_TEST}
    for split, num in parts.items():
        path = root / f"structured_{split}.txt"
        key = "source" if split == "train" else f"{split}_source"
        options += [f"--data.{key}", str(path)]
        if not path.exists():
            root.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{text}\n" for text in structured(split, num)))
    return options


def structured(split: Split, num: int) -> list[str]:
    """Return `num` prompts about positions and counts, one of each task in turns."""
    own = [[p.text for p in split_prompts(split) if p.task == task] for task in STRUCTURED]
    return [own[i % 2][i // 2 % len(own[i % 2])] for i in range(num)]


def run(root: Path, prompts: str, policy: str, steps: int, seed: int, extra: list[str]) -> Report:
    """Train and test once; return metrics.json."""
    options = [*OPTIONS, *data(root, prompts), *POLICIES[policy]]
    options += ["--model.sampler.num_steps", str(steps), *extra]
    options += ["--model.seed", str(seed), "--data.seed", str(seed)]
    return fit_and_test(root, f"{prompts} {policy} {steps} {seed}", options)


def gain(results: list[Report]) -> tuple[float, float]:
    """Return mean gain and its standard error."""
    gains = [r["gain"][METRIC] for r in results]
    means = [g["mean"] for g in gains]
    return statistics.mean(means), standard_error(means, gains[0]["sem"])


def plot(gains: dict[tuple[str, int], tuple[float, float]], path: Path) -> None:
    """Draw gain against steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for policy in dict.fromkeys(name for name, _ in gains):
        steps = [n for name, n in gains if name == policy]
        means, errors = zip(*(gains[policy, n] for n in steps), strict=True)
        axes.errorbar(steps, means, errors, marker="o", capsize=3, label=policy)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    steps = sorted({n for _, n in gains})
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.set(xlabel="sampler steps, in training and test", ylabel=f"gain in {METRIC}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def kept(results: Sequence[Report]) -> str:
    """Return the share of best of 4's gain that one sample has, mean over seeds and its error."""
    shares = [r["kept"][METRIC] for r in results if "kept" in r]
    if not shares:
        return "-"
    means = [share["mean"] for share in shares]
    return f"{statistics.mean(means):.2f} ± {standard_error(means, shares[0]['sem']):.2f}"


def row(results: dict[str, list[Report]]) -> list[str]:
    """Return the cells of one number of steps, given the runs of each policy."""
    seen = results["prompt-conditioned"]
    base = statistics.mean(r["reference"][METRIC]["mean"] for r in seen)
    gains_of_best = [
        r[BEST][METRIC]["mean"] - r["reference"][METRIC]["mean"] for r in seen if BEST in r
    ]
    best = f"{statistics.mean(gains_of_best):+.3f}" if gains_of_best else "-"
    kl = statistics.mean(r["tuned"]["kl"]["mean"] for r in seen)
    gains = ["{:+.3f} ± {:.3f}".format(*gain(own)) if own else "-" for own in results.values()]
    return [str(len(seen)), f"{base:.3f}", *gains, best, kept(seen), f"{kl:.3g}"]


def main() -> None:
    """Run everything, print the table, draw the plot."""
    parser = command_line(__doc__, "runs/noise_ppo_steps", POLICIES, seeds=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--prompts", choices=["all", "structured"], default="all")
    parser.add_argument("--finished", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, default=None, help="needs matplotlib")
    options, extra = parser.parse_known_args()
    jobs = [
        (policy, steps, seed)
        for seed, steps, policy in product(options.seeds, options.steps, options.arms)
    ]
    if options.finished:
        jobs = [job for job in jobs if finished(options.root, options.prompts, *job)]
    results = run_all(
        jobs, lambda job: run(options.root, options.prompts, *job, extra), options.workers
    )
    gains: dict[tuple[str, int], tuple[float, float]] = {}
    rows: list[list[str]] = []
    for n in options.steps:
        own = {p: [r for (q, m, _), r in results.items() if (q, m) == (p, n)] for p in POLICIES}
        gains |= {(policy, n): gain(reports) for policy, reports in own.items() if reports}
        if own["prompt-conditioned"]:
            rows.append([str(n), *row(own)])
    columns = ["steps", "seeds", f"base {METRIC}", *POLICIES, "best of 4", "kept", "kl (nats)"]
    print_table(columns, rows)
    if options.plot is not None:
        plot(gains, options.plot)


def finished(root: Path, prompts: str, policy: str, steps: int, seed: int) -> bool:
    """Return whether a run has its numbers."""
    return (folder_of(root, f"{prompts} {policy} {steps} {seed}") / "metrics.json").exists()


if __name__ == "__main__":
    main()
