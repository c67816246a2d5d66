"""Rejection sampling, policy gradients and learned noise at equal reward calls.

Method: each arm and seed is trained and tested once, through the command line, on the embedded
model without guidance, 10 sampler steps, LoRA of rank 8: 16 rounds of 192 prompts with 4 samples
each, so 12,288 reward calls. GRAFT, P-GRAFT and RandomK are `configs/experiments/
shapes_p_graft.yaml` (what `make demo` runs) with another cut or acceptance rule, and share their
runs with `p_graft_cut.py` where `--root` is the same. DDPO, GRPO and Noise PPO are their own
configs with the options in `ARMS`, DDPO and GRPO without a KL term. All sample with eta = 1, Noise
PPO with eta = 0, whose reference is another; best of 4 draws from that one and spends its reward
calls in the test. The seed sets the initialisation, every sample drawn and the order of the
prompts. Tuned and reference samples share held-out prompts and noise; the gain is the mean over
seeds of the paired difference, its standard error that of the seeds' means.

    python benchmarks/equal_reward_calls.py --root runs/equal --seeds 0 1 2 --workers 2

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import statistics
from pathlib import Path

from command_line import Report, change, command_line, fit_and_test, print_table, run_all
from p_graft_cut import ARMS as CUTS
from p_graft_cut import CONFIG

DOMAIN = [
    *("--config", "configs/domains/shapes.yaml", "--pipeline.guidance_scale", "1.0"),
    *("--data.num_train_prompts", "3072", "--data.batch_size", "192"),
    *("--data.num_test_prompts", "192", "--data.eval_batch_size", "48"),
]
SAMPLES = ["--model.num_candidates", "4", "--model.sampler.num_steps", "10"]
# A state has 256 numbers: the published clip range, 1e-4, is for the mean over 16,384.
POLICY = [*SAMPLES, "--model.num_train_steps", "5", "--model.optimizer.lr", "1e-3"]
POLICY += ["--model.clip_range", "5e-3", "--model.kl_coef", "0.0"]
POLICY += ["--model.microbatch_size", "128", "--model.sampling_batch_size", "128"]
ARMS = {
    "RandomK (k = 2, f = 0.25)": ["--config", CONFIG, *CUTS["RandomK (k = 2, f = 0.25)"]],
    "GRAFT (f = 0)": ["--config", CONFIG, *CUTS["GRAFT (f = 0)"]],
    "P-GRAFT (f = 0.25)": ["--config", CONFIG, *CUTS["P-GRAFT (f = 0.25)"]],
    "DDPO": [*DOMAIN, "--config", "configs/algorithms/ddpo.yaml", *POLICY],
    "GRPO": [*DOMAIN, "--config", "configs/algorithms/grpo.yaml", *POLICY],
    "Noise PPO": [
        *(*DOMAIN, "--config", "configs/algorithms/noise_ppo.yaml", *SAMPLES),
        *("--model.best_of", "4"),
    ],
}
METRICS = ("ShapesEval", "ShapesEval/accuracy", "CLIPScore", "diversity")
BEST = "best_of_4_noise"


def run(root: Path, arm: str, seed: int, extra: list[str]) -> Report:
    """Train and test one arm with one seed; return its metrics.json."""
    options = [*ARMS[arm], *extra, "--model.seed", str(seed), "--data.seed", str(seed)]
    return fit_and_test(root, f"{arm} {seed}", options)


def row(arm: str, results: list[Report]) -> list[str]:
    """Return one line of the table."""
    calls = statistics.mean(r["cost"]["denoiser_calls"] for r in results) / 1000
    seconds = statistics.mean(r["cost"]["seconds"] for r in results)
    cells = [change(results, metric) for metric in METRICS]
    return [arm, *cells, f"{calls:.0f} k", f"{seconds:.0f}"]


def baseline(results: list[Report]) -> list[str]:
    """Return the line of best of 4, as if it were a tuned model; its test spends its calls."""
    swapped = [
        {
            "reference": r["reference"],
            "tuned": r[BEST],
            "gain": {m: {"mean": r[BEST][m]["mean"] - r["reference"][m]["mean"]} for m in METRICS},
        }
        for r in results
    ]
    return ["best of 4 noise", *(change(swapped, metric) for metric in METRICS), "0 k", "0"]


def main() -> None:
    """Run all arms and print the table."""
    parser = command_line(__doc__, "runs/equal_reward_calls", ARMS)
    options, extra = parser.parse_known_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    results = run_all(jobs, lambda job: run(options.root, *job, extra), options.workers)
    rows = [row(arm, [results[arm, seed] for seed in options.seeds]) for arm in options.arms]
    if "Noise PPO" in options.arms:
        rows.append(baseline([results["Noise PPO", seed] for seed in options.seeds]))
    print_table(["arm", *METRICS, "denoiser calls", "seconds of training"], rows)


if __name__ == "__main__":
    main()
