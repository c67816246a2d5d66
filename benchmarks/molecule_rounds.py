"""Stability and uniqueness of molecules over rounds of P-GRAFT, with and without de-duplication.

Method: `configs/experiments/molecule_p_graft.yaml`, whose rounds draw from the model tuned so far,
with one of two acceptance rules: every stable candidate, or of those with the same SMILES one. 512
candidates a round. The validation after every few rounds draws 1,024 molecules in one batch,
because uniqueness depends on how many are looked at; round 0 is the untuned model, from the same
noise. With several seeds the lines are means, the bars the seeds' errors.

    python benchmarks/molecule_rounds.py --plot docs/molecule_rounds.png

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

import statistics
from itertools import product
from pathlib import Path

from command_line import (
    Report,
    command_line,
    fit,
    folder_of,
    print_table,
    run_all,
    standard_error,
)
from molecule_algorithms import falling
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = "configs/experiments/molecule_p_graft.yaml"
RULES = {
    "all stable": ["--model.selection", "lit_rlft.core.selection.Threshold"],
    "one of each": [],
}
METRICS = ("molecule_stability", "uniqueness")


def run(root: Path, rule: str, seed: int, rounds: int, every: int, extra: list[str]) -> Report:
    """Train once; return each metric before the first round and after every few."""
    options = ["--config", CONFIG, *RULES[rule]]
    options += ["--trainer.limit_train_batches", str(rounds), *falling(rounds)]
    options += ["--data.num_val", "256", "--data.eval_batch_size", "256"]
    options += ["--trainer.val_check_interval", str(every), "--trainer.limit_val_batches", "1"]
    options += ["--model.seed", str(seed), "--data.seed", str(seed), *extra]
    folder = folder_of(root, f"{rule} {seed}")
    fit(folder, options)
    events = EventAccumulator(str(folder)).Reload()
    curves = {}
    for metric in METRICS:
        tuned = [event.value for event in events.Scalars(f"val/{metric}")]
        curves[metric] = [events.Scalars(f"val_reference/{metric}")[0].value, *tuned]
    return curves


def mean(curves: list[list[float]]) -> list[tuple[float, float]]:
    """Return mean and standard error over seeds at each point; errors are 0 for one seed."""
    points = zip(*curves, strict=True)
    return [(statistics.mean(point), standard_error(point, 0.0)) for point in points]


def plot(curves: dict[str, dict[str, list[tuple[float, float]]]], every: int, path: Path) -> None:
    """Draw each metric against rounds."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(METRICS), figsize=(8, 3.2), layout="constrained")
    for metric, axes in zip(METRICS, panels, strict=True):
        for rule, by_metric in curves.items():
            means, errors = zip(*by_metric[metric], strict=True)
            rounds = [every * i for i in range(len(means))]
            axes.errorbar(rounds, means, errors, marker="o", capsize=3, label=rule)
        axes.set(xlabel="rounds of 512 candidates", ylabel=metric.replace("_", " "))
        axes.legend(title="accepted")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run both rules, print the table, draw the plot."""
    parser = command_line(__doc__, "runs/molecule_rounds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--every", type=int, default=2, help="rounds between validations")
    parser.add_argument("--plot", type=Path, default=None, help="needs matplotlib")
    options, extra = parser.parse_known_args()
    sizes = (options.rounds, options.every)
    jobs = list(product(RULES, options.seeds))
    results = run_all(jobs, lambda job: run(options.root, *job, *sizes, extra), options.workers)
    curves = {
        rule: {m: mean([results[rule, seed][m] for seed in options.seeds]) for m in METRICS}
        for rule in RULES
    }
    rows = []
    for rule, metric in product(RULES, METRICS):
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in curves[rule][metric]]
        rows.append([rule, metric, *cells])
    print_table(["accepted", "metric", *(str(options.every * i) for i in range(len(cells)))], rows)
    if options.plot is not None:
        plot(curves, options.every, options.plot)


if __name__ == "__main__":
    main()
