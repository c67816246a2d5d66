r"""Quality against operations and seconds per sample: a base at several step counts, and corrected.

Method: for every seed and number of base steps one corrector is trained through the command line
with `configs/algorithms/inverse_noise_correction.yaml`, from the domain's config; `test` then
measures the base (reference) and, for every number of corrector steps, corrector and base (tuned),
on the same conditions and the same initial noise. The seed sets the corrector and every sample;
the data are inverted once for all seeds.
Operations are of the forward passes of denoiser and corrector, counted by torch's flop counter;
seconds are the wall time of sampling on one thread, without decoding and metrics, with whatever
else the machine does. Errors are those of the mean over seeds, or of one test where there is one
seed. The last columns compare with the cheapest number of base steps that costs at least as much,
by differences within a seed. With `--mismatched` each corrector is also tested with the other
numbers of base steps. What the config's metrics are measured with (a feature network, the number
of samples) is part of the numbers: compare none with another config's.

    python benchmarks/sampling_cost.py --config configs/domains/digits.yaml \
        --metrics fid_digits_features kid_digits_features --base-steps 2 3 4 \
        --base-only 6 8 --corrector-steps 5 10 --root runs/sampling_cost

Further options go to the command line as they are, for example
`--model.data_noise 1e-3 --trainer.max_epochs 20`. Writes a table, `quality_against_cost.png` and
a TensorBoard log into the root. Finished runs are kept, so an interrupted benchmark goes on.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib
from command_line import (
    Report,
    command_line,
    fit,
    lit_rlft,
    print_table,
    run_all,
    standard_error,
)
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

Reports = dict[tuple[int, int], Report]
"""By numbers of base and of corrector steps."""

ALGORITHM = "configs/algorithms/inverse_noise_correction.yaml"


@dataclass(frozen=True)
class Point:
    """What one setting costs per sample, and how good its samples are, with every seed."""

    kind: str
    base_steps: int
    corrector_steps: int
    flops: float
    seconds: float
    values: dict[str, list[float]]
    own_errors: dict[str, float]

    @property
    def label(self) -> str:
        """The setting as "corrector steps + base steps"."""
        own = f"{self.corrector_steps} + " if self.corrector_steps else ""
        return f"{own}{self.base_steps}"

    def quality(self, metric: str) -> tuple[float, float]:
        """Return a metric's mean over seeds and its standard error."""
        values = self.values[metric]
        return statistics.mean(values), standard_error(values, self.own_errors[metric])


def corrected(
    root: Path, seed: int, base: int, tests: Iterable[tuple[int, int]], options: list[str]
) -> Reports:
    """Train the corrector of one seed and number of base steps; return what its tests report.

    Args:
        root: Folder of all runs.
        seed: Of the corrector and of the samples.
        base: Base steps that it is trained for.
        tests: Numbers of base and of corrector steps to test it with.
        options: For the command line.

    Returns:
        metrics.json by (base steps, corrector steps).
    """
    options = [*options, "--model.seed", str(seed), "--trainer.limit_val_batches", "0"]
    options += ["--model.noise_folder", str(root / f"noise_base_{base}")]
    name = f"seed_{seed}_base_{base}"
    checkpoint = fit(root / name, [*options, "--model.sampler.num_steps", str(base)])
    reports: Reports = {}
    for steps, own in dict.fromkeys(tests):
        folder = root / f"{name}_test_{own}_{steps}"
        if not (folder / "metrics.json").exists():
            setting = ["--model.sampler.num_steps", str(steps), "--model.corrector_steps", str(own)]
            forced = ["--model.force_num_steps", "true", "--ckpt_path", str(checkpoint)]
            lit_rlft("test", folder, [*options, *setting, *forced])
        reports[steps, own] = json.loads((folder / "metrics.json").read_text())
    return reports


def point(
    reports: Sequence[Report], arm: str, metrics: Sequence[str], kind: str, steps: tuple[int, int]
) -> Point:
    """Return one setting of all seeds."""
    for metric in metrics:
        if metric not in reports[0][arm]:
            known = sorted(reports[0][arm])
            raise SystemExit(f"there is no metric {metric!r}; the config has {known}")
    return Point(
        kind,
        *steps,
        statistics.mean(r["cost"]["flops_per_sample"][arm] for r in reports),
        statistics.mean(r["cost"]["seconds_per_sample"][arm] for r in reports),
        {name: [number(r[arm][name]["mean"]) for r in reports] for name in metrics},
        {name: number(reports[0][arm][name]["sem"]) for name in metrics},
    )


def number(value: float | None) -> float:
    """Return a number of metrics.json, NaN where there is none."""
    return float("nan") if value is None else value


def measure(arguments: argparse.Namespace, options: list[str]) -> list[Point]:
    """Train and test everything."""
    own, bases, seeds = arguments.corrector_steps, arguments.base_steps, arguments.seeds
    others = {base: [n for n in bases if n != base and arguments.mismatched] for base in bases}
    # Any corrector's test measures the base alone beside it.
    alone = {n: (base, n, own[0]) for base in bases[:1] for n in arguments.base_only}
    alone |= {base: (base, base, own[0]) for base in bases}

    def run(base: int) -> dict[int, Reports]:
        tests = [*product([base], own), *product(others[base], [max(own)])]
        tests += [(n, steps) for trained, n, steps in alone.values() if trained == base]
        # One seed after another: the first one's inversion is everyone's.
        return {seed: corrected(arguments.root, seed, base, tests, options) for seed in seeds}

    found = run_all(bases, run, arguments.workers)

    def of(arm: str, kind: str, base: int, n: int, steps: int) -> Point:
        reports = [found[base][seed][n, steps] for seed in seeds]
        drawn = 0 if arm == "reference" else steps
        return point(reports, arm, arguments.metrics, kind, (n, drawn))

    points = [of("reference", "base", *alone[n]) for n in sorted(alone)]
    points += [of("tuned", "corrector + base", n, n, steps) for n, steps in product(bases, own)]
    for base in bases:
        kind = f"corrector of {base} steps"
        points += [of("tuned", kind, base, n, max(own)) for n in others[base]]
    return points


def dearer_base(points: Sequence[Point], setting: Point) -> Point | None:
    """Return the cheapest base that costs at least as many operations as a setting."""
    bases = [p for p in points if p.kind == "base" and p.flops >= setting.flops]
    return min(bases, key=lambda p: p.flops, default=None)


def row(points: Sequence[Point], setting: Point, metrics: Sequence[str]) -> list[str]:
    """Return a line of the table."""
    cells = [setting.kind, setting.label, f"{setting.flops:.4g}", f"{setting.seconds:.2e}"]
    cells += ["{:.4g} ± {:.2g}".format(*setting.quality(metric)) for metric in metrics]
    other = None if setting.kind == "base" else dearer_base(points, setting)
    if other is None:
        return [*cells, "", *[""] * len(metrics)]
    cells.append(other.label)
    for metric in metrics:
        pairs = zip(setting.values[metric], other.values[metric], strict=True)
        differences = [a - b for a, b in pairs]
        cells.append(f"{statistics.mean(differences):+.4g} ± {standard_error(differences):.2g}")
    return cells


def plot(points: Sequence[Point], metrics: Sequence[str]) -> Figure:
    """Draw each metric over operations per sample; every point says its steps."""
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(6 * len(metrics), 4.5), layout="constrained", squeeze=False
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        for kind in dict.fromkeys(p.kind for p in points):
            own = sorted((p for p in points if p.kind == kind), key=lambda p: p.flops)
            flops = [p.flops for p in own]
            means, errors = zip(*(p.quality(metric) for p in own), strict=True)
            bars = [0.0 if e != e else e for e in errors]
            line = "-" if kind == "base" else ""
            axes.errorbar(flops, means, bars, fmt=f"o{line}", capsize=3, label=kind)
            for p, mean in zip(own, means, strict=True):
                axes.annotate(
                    p.label, (p.flops, mean), (4, 4), textcoords="offset points", fontsize=8
                )
        axes.set(xscale="log", xlabel="FLOPs per sample (forward passes)", ylabel=metric)
        axes.set_title("labels: corrector steps + base steps; bars: standard errors", fontsize=9)
        axes.legend()
    return figure


def log(points: Sequence[Point], figure: Figure, metrics: Sequence[str], folder: Path) -> None:
    """Write the picture and the points to TensorBoard, with operations on the x-axis."""
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("quality_against_cost", figure, close=False)
        for p, metric in product(points, metrics):
            tag = f"{p.kind.replace(' ', '_').replace('+', 'and')}/{metric}_by_kiloflops"
            writer.add_scalar(tag, p.quality(metric)[0], round(p.flops / 1000))


def main() -> None:
    """Measure, print the table, draw the plot."""
    parser = command_line(__doc__, "runs/sampling_cost")
    parser.add_argument("--config", action="append", required=True, help="the domain's; repeatable")
    parser.add_argument("--metrics", nargs="+", required=True, help="names in metrics.json")
    parser.add_argument("--base-steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--base-only", type=int, nargs="*", default=[], help="without corrector")
    parser.add_argument("--corrector-steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--mismatched", action="store_true", help="also with other step counts")
    arguments, extra = parser.parse_known_args()
    configs = [flag for path in [*arguments.config, ALGORITHM] for flag in ("--config", path)]
    points, metrics = measure(arguments, [*configs, *extra]), arguments.metrics
    differences = [f"{metric} minus it" for metric in metrics]
    head = ["", "steps", "FLOPs per sample", "seconds per sample", *metrics, "base steps beside"]
    print_table([*head, *differences], (row(points, p, metrics) for p in points))
    figure = plot(points, metrics)
    path = arguments.root / "quality_against_cost.png"
    figure.savefig(path, dpi=150)
    log(points, figure, metrics, arguments.root / "tensorboard")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
