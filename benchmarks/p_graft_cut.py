"""Reward, accuracy and diversity of P-GRAFT against the cut f, with the RandomK control.

Method: `configs/experiments/shapes_p_graft.yaml` (what `make demo` runs) is trained and tested once
per arm and seed, through the command line; arms differ in the cut (0 is GRAFT) or, for RandomK, in
the acceptance rule. All arms draw the same number of samples and take the same number of updates.
The seed sets the adapter's initialisation, every sample drawn and the order of the prompts. Tuned
and reference samples share prompts (held out) and noise; the gain is the mean over seeds of the
paired difference, its standard error is that of the seeds' means.

    python benchmarks/p_graft_cut.py --root runs/p_graft_cut --seeds 0 1 2 --workers 2

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIG = "configs/experiments/shapes_p_graft.yaml"
ARMS = {
    "GRAFT (f = 0)": ["--model.cut", "0.0"],
    "P-GRAFT (f = 0.25)": ["--model.cut", "0.25"],
    "P-GRAFT (f = 0.5)": ["--model.cut", "0.5"],
    "P-GRAFT (f = 0.75)": ["--model.cut", "0.75"],
    "RandomK (f = 0.25)": ["--model.cut", "0.25", "--model.selection", "RandomK"],
}
METRICS = ("ShapesEval", "ShapesEval/accuracy", "CLIPScore", "diversity")


def run(
    root: Path, arm: str, seed: int, extra: list[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Train and test one arm with one seed; return its metrics.json."""
    name = f"{''.join(c if c.isalnum() else '_' for c in arm)}_{seed}"
    folder = root / name
    if not (folder / "metrics.json").exists():
        options = ["--config", CONFIG, *ARMS[arm], *extra, "--root", str(root), "--name", name]
        options += ["--model.seed", str(seed), "--data.seed", str(seed)]
        options += ["--trainer.enable_progress_bar", "false"]
        options += ["--trainer.limit_val_batches", "0"]
        command = [str(Path(sys.executable).parent / "lit-rlft")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if not checkpoint.exists():
            subprocess.run([*command, "fit", *options], env=environment, check=True)
        test = [*command, "test", *options, "--ckpt_path", str(checkpoint)]
        subprocess.run(test, env=environment, check=True)
    return json.loads((folder / "metrics.json").read_text())


def row(arm: str, results: list[dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return one line of the table: reference -> tuned (gain +- standard error over seeds)."""
    cells = []
    for metric in METRICS:
        reference = statistics.mean(r["reference"][metric]["mean"] for r in results)
        tuned = statistics.mean(r["tuned"][metric]["mean"] for r in results)
        gains = [r["gain"][metric]["mean"] for r in results]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        gain = statistics.mean(gains)
        cells.append(f"{reference:.3f} → {tuned:.3f} ({gain:+.3f} ± {error:.3f})")
    relative = statistics.mean(
        100 * r["gain"][METRICS[0]]["mean"] / r["reference"][METRICS[0]]["mean"] for r in results
    )
    seconds = statistics.mean(r["cost"]["seconds"] for r in results)
    return f"| {arm} | {' | '.join(cells)} | {relative:+.1f} % | {seconds:.0f} |"


def main() -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/p_graft_cut"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    options, extra = parser.parse_known_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in ARMS]
    with ThreadPoolExecutor(options.workers) as pool:
        outcomes = pool.map(lambda job: run(options.root, *job, extra), jobs)
        results = dict(zip(jobs, outcomes, strict=True))
    print("| arm | " + " | ".join(METRICS) + " | relative gain in reward | seconds of training |")
    print("|---" * (len(METRICS) + 3) + "|")
    for arm in ARMS:
        print(row(arm, [results[arm, seed] for seed in options.seeds]))


if __name__ == "__main__":
    main()
