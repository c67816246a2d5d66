"""Gain of Noise PPO over the base against the sampler's steps, trained at each; a control beside.

Method: `configs/algorithms/noise_ppo.yaml` on the embedded model without guidance is trained and
tested through the command line at each number of deterministic steps: 16 rounds of 96 prompts with
4 samples each, 6,144 reward calls. The control learns one prior for all prompts
(`condition_free`). Tuned and reference samples share held-out prompts and noise. With one seed the
error is that of the paired differences over samples, else that of the seeds' means.

    python benchmarks/noise_ppo_steps.py --root runs/noise_ppo_steps --plot docs/noise_ppo_steps.png

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import statistics
from itertools import product
from pathlib import Path

from command_line import Report, command_line, fit_and_test, print_table, run_all, standard_error

METRIC = "ShapesEval"
POLICIES = {"prompt-conditioned": "false", "prompt-independent": "true"}
OPTIONS = [
    *("--config", "configs/domains/shapes.yaml", "--pipeline.guidance_scale", "1.0"),
    *("--config", "configs/algorithms/noise_ppo.yaml", "--model.num_candidates", "4"),
    *("--data.num_train_prompts", "1536", "--data.batch_size", "96"),
    *("--data.num_test_prompts", "192", "--data.eval_batch_size", "48"),
]


def run(root: Path, policy: str, num_steps: int, seed: int, extra: list[str]) -> Report:
    """Train and test once; return metrics.json."""
    options = [*OPTIONS, "--model.condition_free", POLICIES[policy]]
    options += ["--model.sampler.num_steps", str(num_steps), *extra]
    options += ["--model.seed", str(seed), "--data.seed", str(seed)]
    return fit_and_test(root, f"{policy} {num_steps} {seed}", options)


def gain(results: list[Report]) -> tuple[float, float]:
    """Return mean gain and its standard error."""
    gains = [r["gain"][METRIC] for r in results]
    means = [g["mean"] for g in gains]
    return statistics.mean(means), standard_error(means, gains[0]["sem"])


def plot(gains: dict[tuple[str, int], tuple[float, float]], path: Path) -> None:
    """Draw gain against steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for policy in POLICIES:
        steps = [n for name, n in gains if name == policy]
        means, errors = zip(*(gains[policy, n] for n in steps), strict=True)
        axes.errorbar(steps, means, errors, marker="o", capsize=3, label=policy)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.set(xlabel="sampler steps, in training and test", ylabel=f"gain in {METRIC}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything, print the table, draw the plot."""
    parser = command_line(__doc__, "runs/noise_ppo_steps", seeds=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--plot", type=Path, default=None, help="needs matplotlib")
    options, extra = parser.parse_known_args()
    jobs = list(product(POLICIES, options.steps, options.seeds))
    results = run_all(jobs, lambda job: run(options.root, *job, extra), options.workers)
    gains, rows = {}, []
    for n in options.steps:
        cells = []
        for policy in POLICIES:
            runs = [results[policy, n, seed] for seed in options.seeds]
            gains[policy, n] = gain(runs)
            cells.append("{:+.3f} ± {:.3f}".format(*gains[policy, n]))
        runs = [results["prompt-conditioned", n, seed] for seed in options.seeds]
        base = statistics.mean(r["reference"][METRIC]["mean"] for r in runs)
        kl = statistics.mean(r["tuned"]["kl"]["mean"] for r in runs)
        rows.append([str(n), f"{base:.3f}", *cells, f"{kl:.3g}"])
    print_table(["steps", f"base {METRIC}", *POLICIES, "kl (nats)"], rows)
    if options.plot is not None:
        plot(gains, options.plot)


if __name__ == "__main__":
    main()
