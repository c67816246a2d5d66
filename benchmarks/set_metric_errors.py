"""Standard errors of FID, KID, precision and recall beside their deviations over repeated sampling.

Method: features of known distributions stand for those of samples. Each repeat draws n pairs of
features of a reference and of a tuned model anew, and compares both with the same 1,000 real
features, which follow the reference's distribution: the reference is perfect, the hardest case, as
FID and KID then depend on pairs of samples more than on single ones. A number's true standard error
is its deviation over the repeats. The table shows the root mean square of the estimated errors
over it, 1 where they are right: of the reference, of the tuned model, and of the paired difference.
Beside it that of the difference by 20 groups of samples (what a metric without closed forms gets)
and by 20 bootstrap draws (what versions before used), both over the first third of the repeats.
The ratios' own error is 1 / sqrt(2 repeats), and more for heavy tails.

Distributions in d dimensions with variances that fall as 1 / i: "normal", the tuned model's with
1.21 times the variance, shifted, and correlated with the reference's by 0.8; "white", the same with
equal variances; "heavy", the first with a common log-normal factor of each pair; "mixture", eight
clusters seen through a leaky ReLU, of which the tuned model moves 0.3 of the samples to the first
four. Precision and recall are measured of the mixture's smaller sets.

    python benchmarks/set_metric_errors.py --repeats 120 --seed 0
    python benchmarks/set_metric_errors.py --time 2000 2048
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import LeftOut, SetMetric
from lit_rlft.evaluation.jackknife import compared
from lit_rlft.kit.leave_out import precision_recall_left_out
from lit_rlft.kit.set_metrics import RealFeatures
from lit_rlft.kit.statistics import neighbour_distances, precision_recall

LAWS = ("normal", "white", "heavy", "mixture")
# From 0.03 to 30 samples a dimension.
SIZES = ((32, 1024), (32, 256), (64, 128), (64, 64), (128, 64), (200, 32), (240, 8))
NUM_REAL, NUM_DRAWS, NUM_NEIGHBOURS = 1000, 20, 3
Arms = dict[str, dict[str, Tensor]]
Estimate = Callable[[SetMetric, Arms, int], Mapping[str, Mapping[str, float]]]


class Law:
    """Pairs of features of a reference and of a tuned model.

    Args:
        name: Which of `LAWS`.
        dims: d.
        seed: Seed of the clusters and of all draws.
    """

    def __init__(self, name: str, dims: int, seed: int) -> None:
        self.name, self.dims = name, dims
        self.generator = torch.Generator().manual_seed(seed)
        falling = 0.0 if name == "white" else 0.5
        scales = torch.arange(1, dims + 1, dtype=torch.float64) ** -falling
        self.scales = scales / scales.square().mean().sqrt()
        self.clusters = self.normal(8)

    def normal(self, num: int, dims: int | None = None) -> Tensor:
        """Return standard normal numbers, float64 [num, d]."""
        size = (num, dims or self.dims)
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def draw(self, num: int) -> Arms:
        """Return features [num, d] of "reference" and "tuned"."""
        reference, tuned = self.mixture(num) if self.name == "mixture" else self.ellipses(num)
        arms = {"reference": reference * self.scales, "tuned": tuned * self.scales}
        if self.name == "mixture":
            arms = {arm: torch.nn.functional.leaky_relu(x, 0.1) for arm, x in arms.items()}
        return {arm: {"features": x} for arm, x in arms.items()}

    def ellipses(self, num: int) -> tuple[Tensor, Tensor]:
        """Return normal features, or with a factor for each pair."""
        reference, other = self.normal(num), self.normal(num)
        if self.name == "heavy":
            factors = (0.25 * self.normal(num, 1)).exp()
            reference, other = reference * factors, other * factors
        tuned = 1.1 * (0.8 * reference + 0.6 * other)
        tuned[:, 0] += 0.3
        return reference, tuned

    def mixture(self, num: int) -> tuple[Tensor, Tensor]:
        """Return features of eight clusters."""
        chosen = torch.randint(8, (num,), generator=self.generator)
        moved = torch.rand(num, generator=self.generator) < 0.3
        others = torch.randint(4, (num,), generator=self.generator)
        centres = self.clusters[chosen], self.clusters[others.where(moved, chosen)]
        reference, tuned = (centre + 0.5 * self.normal(num) for centre in centres)
        return reference, tuned


class Distances(SetMetric):
    """FID, KID, precision and recall of features.

    Args:
        real: What they are compared with, [m, d].
        shares: Also measure precision and recall.
        closed: Give the closed forms of the errors.
    """

    def __init__(self, real: Tensor, *, shares: bool, closed: bool = True) -> None:
        super().__init__()
        self.known, self.shares, self.closed = RealFeatures.of(real), shares, closed
        self.radii = neighbour_distances(real, NUM_NEIGHBOURS)

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        return {"features": samples}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        x, known = features["features"], self.known
        values = {"FID": known.frechet_distance(x), "KID": known.kernel_distance(x)}
        if self.shares:
            shares = precision_recall(known.features, x, NUM_NEIGHBOURS, self.radii)
            values |= dict(zip(("precision", "recall"), shares, strict=True))
        return values

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        if not self.closed:
            return {}
        x, known = features["features"], self.known
        values = dict(zip(("FID", "KID"), known.distances_left_out(x, pairs), strict=True))
        if self.shares:
            args = (known.features, x, pairs, NUM_NEIGHBOURS, self.radii)
            shares = precision_recall_left_out(*args)
            values |= dict(zip(("precision", "recall"), shares, strict=True))
        return values


def jackknife(metric: SetMetric, arms: Arms, seed: int) -> dict[str, dict[str, float]]:
    """Return the errors of the library by arm and number."""
    found = compared(metric, arms, NUM_DRAWS, seed)
    return {arm: {name: x["sem"] for name, x in own.items()} for arm, own in found.items()}


def bootstrap(metric: SetMetric, arms: Arms, seed: int) -> dict[str, dict[str, float]]:
    """Return the deviation of the gain over sets drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    num, draws = len(arms["tuned"]["features"]), defaultdict(list)
    for _ in range(NUM_DRAWS):
        rows = torch.randint(num, (num,), generator=generator)
        tuned, reference = (
            metric.compare({"features": arms[arm]["features"][rows]})
            for arm in ("tuned", "reference")
        )
        for name, value in tuned.items():
            draws[name].append(value - reference[name])
    return {
        "gain": {
            name: float(torch.tensor(own, dtype=torch.float64).std()) for name, own in draws.items()
        }
    }


def ratios(
    law: str, num: int, dims: int, repeats: int, seed: int, *, shares: bool, others: bool = True
) -> dict[str, dict[str, float]]:
    """Return the estimated errors over the true ones, by number and column of the table.

    Args:
        law: Which of `LAWS`.
        num: n.
        dims: d.
        repeats: Times that samples are drawn.
        seed: Seed.
        shares: Also measure precision and recall.
        others: Also measure the other estimators.
    """
    source = Law(law, dims, seed)
    real = source.draw(NUM_REAL)["reference"]["features"]
    metric = Distances(real, shares=shares)
    grouped = Distances(real, shares=shares, closed=False)
    estimates: dict[str, tuple[SetMetric, Estimate]] = {"": (metric, jackknife)}
    if others:
        estimates |= {", 20 groups": (grouped, jackknife), ", bootstrap": (metric, bootstrap)}
    values, errors = defaultdict(list), defaultdict(list)
    for repeat in range(repeats):
        arms = source.draw(num)
        found = {arm: metric.compare(features) for arm, features in arms.items()}
        found["gain"] = {k: found["tuned"][k] - found["reference"][k] for k in found["tuned"]}
        for arm, own in found.items():
            for name, value in own.items():
                values[name, arm].append(value)
        for label, (measured, estimate) in estimates.items():
            if label and 3 * repeat >= repeats:
                continue
            for arm, own in estimate(measured, arms, repeat).items():
                for name, error in own.items():
                    if arm == "gain" or not label:
                        errors[name, arm + label].append(error)
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, column), own in errors.items():
        truth = torch.tensor(values[name, column.partition(",")[0]], dtype=torch.float64).std()
        table[name][column] = float(torch.tensor(own).double().square().mean().sqrt() / truth)
    return table


def timed(num: int, dims: int) -> None:
    """Print how long both models' numbers take, without errors and with them."""
    source = Law("mixture", dims, 0)
    metric = Distances(source.draw(num)["reference"]["features"].float(), shares=True)
    arms = {arm: {"features": own["features"].float()} for arm, own in source.draw(num).items()}
    metric.compare(arms["tuned"])  # what the real features need once
    for label, num_draws in (("without errors", 0), ("with errors", NUM_DRAWS)):
        start = time.perf_counter(), time.process_time()
        compared(metric, arms, num_draws)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        print(f"n = {num}, d = {dims}, {label}: {wall:.1f} s, {cpu:.1f} s of CPU time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--laws", choices=LAWS, nargs="+", default=LAWS)
    parser.add_argument("--time", type=int, nargs=2, metavar=("N", "D"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.time:
        timed(*options.time)
        return
    print("| distribution | n | d | n / d | number | reference | tuned | gain", end="")
    print(" | gain, 20 groups | gain, bootstrap |\n|---|---|---|---|---|---|---|---|---|---|")
    for law in options.laws:
        for num, dims in SIZES:
            shares = law == "mixture" and dims <= 256 and num <= 128
            table = ratios(law, num, dims, options.repeats, options.seed, shares=shares)
            for name, columns in table.items():
                numbers = " | ".join(f"{value:.2f}" for value in columns.values())
                row = f"| {law} | {num} | {dims} | {num / dims:.2g} | {name} | {numbers} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
