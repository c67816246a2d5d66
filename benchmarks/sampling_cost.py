r"""Quality against operations and seconds per sample: a base at several step counts, and corrected.

Method: for every number of base steps one corrector is trained through the command line with
`configs/algorithms/inverse_noise_correction.yaml`, from the domain's config; `test` then measures
the base (reference) and, for every number of corrector steps, corrector and base (tuned), on the
same conditions and the same initial noise. Operations are of the forward passes of denoiser and
corrector, counted by torch's flop counter; seconds are the wall time of sampling on one thread,
without decoding and metrics, with whatever else the machine does. With `--mismatched` each
corrector is also tested with the other numbers of base steps. What the config's metrics are
measured with (a feature network, the number of samples) is part of the numbers: compare none with
another config's.

    python benchmarks/sampling_cost.py --config configs/domains/layout.yaml --metric fid \
        --base-steps 5 10 20 --corrector-steps 2 4 8 --root runs/sampling_cost

Further options go to the command line as they are, for example
`--model.data_noise 1e-3 --trainer.max_epochs 20`. Writes a table, `quality_against_cost.png` and
a TensorBoard log into the root. Finished runs are kept, so an interrupted benchmark goes on.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from command_line import fit, lit_rlft
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

ALGORITHM = "configs/algorithms/inverse_noise_correction.yaml"


@dataclass(frozen=True)
class Point:
    """What one setting costs per sample, and how good its samples are."""

    kind: str
    base_steps: int
    corrector_steps: int
    flops: float
    seconds: float
    quality: float
    error: float

    @property
    def label(self) -> str:
        """The setting as "corrector steps + base steps"."""
        own = f"{self.corrector_steps} + " if self.corrector_steps else ""
        return f"{own}{self.base_steps}"


def trained(root: Path, base_steps: int, options: list[str]) -> Path:
    """Train the corrector of a number of base steps, unless it is there; return its checkpoint."""
    own = ["--model.sampler.num_steps", str(base_steps), "--trainer.limit_val_batches", "0"]
    return fit(root / f"base_{base_steps}", [*options, *own])


def tested(
    root: Path, checkpoint: Path, base_steps: int, corrector_steps: int, options: list[str]
) -> dict[str, Any]:
    """Test a corrector with some numbers of steps, unless that is done; return metrics.json."""
    folder = root / f"{checkpoint.parents[1].name}_test_{corrector_steps}_{base_steps}"
    path = folder / "metrics.json"
    if not path.exists():
        own = ["--ckpt_path", str(checkpoint), "--model.force_num_steps", "true"]
        own += ["--model.sampler.num_steps", str(base_steps)]
        own += ["--model.corrector_steps", str(corrector_steps)]
        lit_rlft("test", folder, [*options, *own])
    return json.loads(path.read_text())


def point(
    report: dict[str, Any], arm: str, metric: str, kind: str, steps: tuple[int, int]
) -> Point:
    """Return one arm of a report."""
    if metric not in report[arm]:
        raise SystemExit(f"there is no metric {metric!r}; the config has {sorted(report[arm])}")
    cost, value = report["cost"], report[arm][metric]
    nothing = float("nan")
    return Point(
        kind,
        *steps,
        cost["flops_per_sample"][arm],
        cost["seconds_per_sample"][arm],
        value["mean"] if value["mean"] is not None else nothing,
        value["sem"] if value["sem"] is not None else nothing,
    )


def measure(arguments: argparse.Namespace, options: list[str]) -> list[Point]:
    """Train and test everything."""
    points = []
    for base in arguments.base_steps:
        checkpoint = trained(arguments.root, base, options)
        for i, own in enumerate(arguments.corrector_steps):
            report = tested(arguments.root, checkpoint, base, own, options)
            if i == 0:
                points.append(point(report, "reference", arguments.metric, "base", (base, 0)))
            points.append(point(report, "tuned", arguments.metric, "corrector + base", (base, own)))
        for other in arguments.base_steps if arguments.mismatched else ():
            if other != base:
                own = max(arguments.corrector_steps)
                report = tested(arguments.root, checkpoint, other, own, options)
                kind = f"corrector of {base} steps"
                points.append(point(report, "tuned", arguments.metric, kind, (other, own)))
    return points


def plot(points: list[Point], metric: str) -> Figure:
    """Draw quality over operations per sample; every point says its steps."""
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for kind in dict.fromkeys(p.kind for p in points):
        own = sorted((p for p in points if p.kind == kind), key=lambda p: p.flops)
        line = "-" if kind == "base" else ""
        flops, quality = [p.flops for p in own], [p.quality for p in own]
        errors = [0.0 if p.error != p.error else p.error for p in own]
        axes.errorbar(flops, quality, errors, fmt=f"o{line}", capsize=3, label=kind)
        for p in own:
            place = (p.flops, p.quality)
            axes.annotate(p.label, place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="FLOPs per sample (forward passes)", ylabel=metric)
    axes.set_title("labels: corrector steps + base steps; bars: standard errors", fontsize=9)
    axes.legend()
    return figure


def log(points: list[Point], figure: Figure, metric: str, folder: Path) -> None:
    """Write the picture and the points to TensorBoard, with operations on the x-axis."""
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("quality_against_cost", figure, close=False)
        for p in points:
            tag = f"{p.kind.replace(' ', '_').replace('+', 'and')}/{metric}"
            writer.add_scalar(f"{tag}_by_kiloflops", p.quality, round(p.flops / 1000))


def main() -> None:
    """Measure, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="the domain's; repeatable")
    parser.add_argument("--metric", required=True, help="a name in metrics.json")
    parser.add_argument("--base-steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--corrector-steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--mismatched", action="store_true", help="also with other step counts")
    parser.add_argument("--root", type=Path, default=Path("runs/sampling_cost"))
    arguments, extra = parser.parse_known_args()
    configs = [flag for path in [*arguments.config, ALGORITHM] for flag in ("--config", path)]
    options = [*configs, *extra]
    points = measure(arguments, options)
    print(f"| | steps | FLOPs per sample | seconds per sample | {arguments.metric} |")
    print("|---|---|---|---|---|")
    for p in points:
        quality = f"{p.quality:.4f} ± {p.error:.4f}"
        print(f"| {p.kind} | {p.label} | {p.flops:.4g} | {p.seconds:.2e} | {quality} |")
    figure = plot(points, arguments.metric)
    path = arguments.root / "quality_against_cost.png"
    figure.savefig(path, dpi=150)
    log(points, figure, arguments.metric, arguments.root / "tensorboard")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
