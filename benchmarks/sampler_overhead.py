"""What a sampler's step costs beside the network, here and in another version of the code.

Method: a process for each version samples each domain by its embedded model, at eta 0, at eta 1 and
with log-probabilities, and the two take turns, one pass each. "Beside the network" is all but the
calls of the pipeline, which are replaced by a fixed prediction; operations are those that torch
dispatches but for views and draws. A step's are what a walk of twice the steps has more, a walk's
own are the rest. Times are of the processor, medians over passes with quartiles of the ratio
(ours / theirs) over pairs. "Share" is the part of an ordinary walk's time, pipeline and all, that
is spent outside the pipeline.

    python benchmarks/sampler_overhead.py
    python benchmarks/sampler_overhead.py --beside ../another/checkout --num-samples 1024
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import walk
from lit_rlft.core.trajectory import walk_with_log_probs

DOMAINS = ("mixture", "layout", "layout, mixed", "molecule", "molecule, mixed", "shapes")
WAYS = ("eta 0", "eta 1", "log-probabilities")
NOT_COUNTED = {
    *("_unsafe_view", "alias", "detach", "expand", "permute", "reshape", "select", "slice"),
    *("split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("normal_", "rand", "randn", "uniform_"),
}
Row = dict[str, float]


class Count(TorchDispatchMode):
    """Counts operations."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += func.overloadpacket.__name__ not in NOT_COUNTED
        return func(*args, **(kwargs or {}))


def pipeline_of(domain: str) -> Pipeline:
    """Return a domain's embedded model."""
    name, _, mixed = domain.partition(", ")
    if name == "mixture":
        from domains.gaussian_mixture.pipeline import GaussianMixturePipeline

        return GaussianMixturePipeline()
    if name == "layout":
        from domains.layout.pipeline import LayoutPipeline

        return LayoutPipeline("grammar_mixed" if mixed else "grammar")
    if name == "molecule":
        from domains.molecule.pipeline import MoleculePipeline

        return MoleculePipeline("small_mixed" if mixed else "small")
    from domains.text_to_image.pipeline import TextToImagePipeline

    return TextToImagePipeline("shapes", guidance_scale=3.0)


class Sampling:
    """Walks of one domain's model.

    Args:
        domain: Its name.
        num_samples: Samples of a walk.
        num_steps: Its steps.
    """

    def __init__(self, domain: str, num_samples: int, num_steps: int) -> None:
        self.pipeline = pipeline_of(domain).requires_grad_(False).eval()
        self.condition: Condition = self.pipeline.example().repeat(num_samples)
        self.num_samples, self.num_steps, self.within = num_samples, num_steps, 0.0
        process = self.pipeline.process
        self.x_1 = process.prior(self.pipeline.blank(self.condition)).sample(self.noise)
        t = process.times(num_steps)[0].expand(num_samples)
        self.known = self.pipeline(self.x_1, t, self.condition)

    @property
    def noise(self) -> list[torch.Generator]:
        """Fresh generators."""
        return generators(range(self.num_samples))

    def walk(self, way: str, denoiser: Callable[..., Any], times: int = 1) -> None:
        """Walk once, or with several times the steps."""
        process, num_steps = self.pipeline.process, times * self.num_steps
        grid, ends = process.times(num_steps), process.ends(num_steps)
        args = (denoiser, process, self.x_1, self.condition, grid)
        steps: Iterator[Any]
        if way == "log-probabilities":
            steps = walk_with_log_probs(*args, 1.0, self.noise, ends=ends)
        else:
            steps = walk(*args, float(way[-1]), self.noise, ends)
        for _ in steps:
            pass

    def timed(self, *args: Any) -> Any:
        """Call the pipeline, whose time is taken apart."""
        start = time.process_time()
        found = self.pipeline(*args)
        self.within += time.process_time() - start
        return found

    def measured(self, way: str, *, whole: bool) -> Row:
        """Return what one pass finds; a `whole` one also walks with the network."""

        def fixed(*args: Any) -> Any:
            return self.known

        row: Row = {}
        start = time.process_time()
        self.walk(way, fixed)
        row["ms"] = 1000 * (time.process_time() - start) / self.num_steps
        totals = []
        for times in (1, 2):
            with Count() as count:
                self.walk(way, fixed, times)
            totals.append(count.total)
        row["operations"] = (totals[1] - totals[0]) / self.num_steps
        row["walk"] = 2 * totals[0] - totals[1]
        if whole:
            self.within, start = 0.0, time.process_time()
            self.walk(way, self.timed)
            row["share"] = 1 - self.within / (time.process_time() - start)
        return row


def work(num_samples: int, num_steps: int) -> None:
    """Answer each line of the input, a domain, a way and whether whole, by a line of JSON."""
    torch.set_num_threads(1)
    known: dict[str, Sampling] = {}
    with torch.no_grad():
        for line in sys.stdin:
            domain, way, whole = json.loads(line)
            if domain not in known:
                known = {domain: Sampling(domain, num_samples, num_steps)}
                for each in WAYS:  # warm-up; the tables of both grids are then known
                    known[domain].measured(each, whole=False)
            print(json.dumps(known[domain].measured(way, whole=whole)), flush=True)


class Side:
    """A process that samples with the code of one checkout."""

    def __init__(self, root: Path, sizes: Sequence[int]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", *map(str, sizes)]
        environment = {**os.environ, "PYTHONPATH": str(root.resolve()), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process: Any = subprocess.Popen(
            command, **pipes, text=True, env=environment, stderr=subprocess.DEVNULL, cwd=root
        )

    def ask(self, domain: str, way: str, *, whole: bool) -> Row:
        """Return what one pass finds."""
        self.process.stdin.write(json.dumps([domain, way, whole]) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                found: Row = json.loads(line)
                return found
        raise SystemExit(f"sampling {domain} failed")


def row_of(sides: Sequence[Side], domain: str, way: str, num_repeats: int) -> str:
    """Return one row of the table."""
    passes: list[list[Row]] = [[] for _ in sides]
    for repeat in range(num_repeats):
        order = range(len(sides)) if repeat % 2 else reversed(range(len(sides)))
        for side in order:
            whole = repeat < (1 if domain == "shapes" else 3)
            passes[side].append(sides[side].ask(domain, way, whole=whole))
    cells = [domain, way]
    forms = {"operations": "{:.0f}", "walk": "{:.0f}", "ms": "{:.2f}", "share": "{:.0%}"}
    for name, form in forms.items():
        medians = [statistics.median([row[name] for row in own if name in row]) for own in passes]
        cells += [form.format(median) for median in medians]
    if len(sides) == 2:
        ratios = [a["ms"] / b["ms"] for a, b in zip(*passes, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        cells.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every domain and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--num-repeats", type=int, default=9)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    if options.num_repeats < 2:
        parser.error("--num-repeats must be at least 2, for quartiles")
    roots = [Path(__file__).parents[1], *filter(None, [options.beside])]
    sizes = (options.num_samples, options.num_steps)
    sides = [Side(root, sizes) for root in roots]
    both = ["ours", "theirs"][: len(sides)]
    names = ("operations a step", "a walk's own", "ms a step", "share")
    titles = [f"{name}, {who}" for name in names for who in both]
    titles += ["ratio of ms (quartiles)"] * (len(sides) == 2)
    print(f"| domain | way | {' | '.join(titles)} |")
    print("|---" * (2 + len(titles)) + "|")
    for domain in options.domains:
        for way in WAYS:
            print(row_of(sides, domain, way, options.num_repeats), flush=True)


if __name__ == "__main__":
    main()
