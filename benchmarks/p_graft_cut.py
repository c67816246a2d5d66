"""Reward, accuracy and diversity of P-GRAFT against the cut f, with the RandomK control.

Method: `configs/experiments/shapes_p_graft.yaml` (what `make demo` runs) is trained and tested once
per arm and seed, through the command line; arms differ in the cut (0 is GRAFT) or, for RandomK, in
the acceptance rule. All arms draw the same number of candidates from the same prompts.
The seed sets the adapter's initialisation, every sample drawn and the order of the prompts. Tuned
and reference samples share prompts (held out) and noise; the gain is the mean over seeds of the
paired difference, its standard error is that of the seeds' means.

    python benchmarks/p_graft_cut.py --root runs/p_graft_cut --seeds 0 1 2 --workers 2

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import statistics
from pathlib import Path

from command_line import Report, change, command_line, fit_and_test, print_table, run_all

CONFIG = "configs/experiments/shapes_p_graft.yaml"
ARMS = {
    "GRAFT (f = 0)": ["--model.cut", "0.0"],
    "P-GRAFT (f = 0.25)": ["--model.cut", "0.25"],
    "P-GRAFT (f = 0.5)": ["--model.cut", "0.5"],
    "P-GRAFT (f = 0.75)": ["--model.cut", "0.75"],
    "RandomK (k = 2, f = 0.25)": [
        *("--model.cut", "0.25", "--model.selection", "lit_rlft.core.selection.RandomK"),
        *("--model.selection.k", "2"),
    ],
}
METRICS = ("ShapesEval", "ShapesEval/accuracy", "CLIPScore", "diversity")


def run(root: Path, arm: str, seed: int, extra: list[str]) -> Report:
    """Train and test one arm with one seed; return its metrics.json."""
    options = ["--config", CONFIG, *ARMS[arm], *extra]
    options += ["--model.seed", str(seed), "--data.seed", str(seed)]
    return fit_and_test(root, f"{arm} {seed}", options)


def row(arm: str, results: list[Report]) -> list[str]:
    """Return one line of the table."""
    relative = statistics.mean(
        100 * r["gain"][METRICS[0]]["mean"] / r["reference"][METRICS[0]]["mean"] for r in results
    )
    return [arm, *(change(results, metric) for metric in METRICS), f"{relative:+.1f} %"]


def main() -> None:
    """Run all arms and print the table."""
    parser = command_line(__doc__, "runs/p_graft_cut", ARMS)
    options, extra = parser.parse_known_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    results = run_all(jobs, lambda job: run(options.root, *job, extra), options.workers)
    rows = [row(arm, [results[arm, seed] for seed in options.seeds]) for arm in options.arms]
    print_table(["arm", *METRICS, "relative gain in reward"], rows)


if __name__ == "__main__":
    main()
