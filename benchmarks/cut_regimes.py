"""When does P-GRAFT beat GRAFT? The cut f by accepted samples and by what is trained.

Method: per seed the pretrained model of a domain draws 8 candidates for each of 4,096 + 512
conditions once, with 20 ancestral steps, and keeps x_0 and x_tau of every cut. A reward accepts the
best of each 8; the published loss alone (accepted samples, no contrast) fits the first n of them in
200 updates of 128, AdamW, learning rate falling linearly to 0. Then 1,024 samples are drawn, the
reference's share f of the steps by the reference, with the noise of as many of the reference.
Recorded: gain in the trained reward with its paired error, FID and what comes with it, gains of
rewards that are not trained for, and on 512 accepted samples that were not trained on the loss at
five noise levels, tuned - reference, in units of the reference's. One process runs all, one line of
JSON per cell; what is there is kept, so that an interrupted benchmark goes on where it stopped.

    python benchmarks/cut_regimes.py run --out cut_regimes.jsonl --seeds 0
    python benchmarks/cut_regimes.py run --out cut_regimes.jsonl --domain digits --seeds 0 1 2 3 4 \
        --accepted 64 1024 --trained "LoRA 32"
    python benchmarks/cut_regimes.py run --out cut_regimes.jsonl --seeds 0 1 2 3 4 --accepted 64 \
        --trained "LoRA 32" --cuts 0 0.25 --updates 25 50 100
    python benchmarks/cut_regimes.py table --out cut_regimes.jsonl
    python benchmarks/cut_regimes.py versus --out cut_regimes.jsonl

`versus` prints each cut's differences from f = 0, paired by seed.

Rewards of layouts: `page`, the domain's own (alignment weighs most: edges in line, decided by the
last steps), and `coverage` (decided early); `critic` judges both. Rewards of digits: `three`, a
classifier's log-probability of that digit, which another network's judges, and `brightness`, which
pulls away from the data and is judged by the share of samples that lie among real digits
(precision). `lit-rlft profile` shows when a reward is decided.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from quiet import quiet_trainer
from torch import Tensor

from domains.image.metrics import SetDistances as PictureDistances
from domains.image.pipeline import ImagePipeline
from domains.image.rewards import Brightness, ClassProbability
from domains.layout.metrics import SetDistances as PageDistances
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Alignment, Coverage, Critic, InsidePage, Overlap
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, index, leaves
from lit_rlft.kit.ratios import error_of_mean
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA
from lit_rlft.runs.lines import append_lines, read_lines

STEPS, CANDIDATES, HELD_OUT, TEST = 20, 8, 512, 1024
CUTS = (0.0, 0.25, 0.5)
ACCEPTED = (64, 256, 1024, 4096)
TRAINED: dict[str, tuple[LoRA | None, float]] = {
    "LoRA 4": (LoRA(4, 4), 1e-3),
    "LoRA 32": (LoRA(32, 32), 1e-3),
    "full": (None, 1e-4),
}
UPDATES, BATCH = 200, 128
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Domain:
    """Where the cut is tried.

    Attributes:
        pipeline: Makes the pretrained model.
        rewards: Makes the rewards that are trained for or held out.
        judges: The held-out reward or distance that judges, by the trained reward.
        distances: Makes the metric of sets.
        fid: Its name of FID.
        recall: Its name of the share of the data's variety that samples have, None without one.
    """

    pipeline: Callable[[], Pipeline]
    rewards: Callable[[], dict[str, Reward]]
    judges: Mapping[str, str]
    distances: Callable[[], PageDistances | PictureDistances]
    fid: str
    recall: str | None = None


def page_rewards() -> dict[str, Reward]:
    """Return the rewards of layouts."""
    parts: dict[str, Reward] = {"overlap": Overlap(), "alignment": Alignment()}
    parts |= {"coverage": Coverage(), "inside": InsidePage()}
    page = WeightedSum(parts, {"alignment": 10.0, "coverage": 0.5})
    return {"page": page, "coverage": Coverage(), "overlap": Overlap(), "critic": Critic()}


def digit_rewards() -> dict[str, Reward]:
    """Return the rewards of digits."""
    return {
        "three": ClassProbability("3"),
        "brightness": Brightness(),
        "three, other network": ClassProbability("3", "digits_features"),
    }


DOMAINS = {
    "layout": Domain(
        lambda: LayoutPipeline("grammar"),
        page_rewards,
        {"page": "critic", "coverage": "critic"},
        lambda: PageDistances(num_draws=0),
        "fid",
    ),
    "digits": Domain(
        lambda: ImagePipeline("digits"),
        digit_rewards,
        {"three": "three, other network", "brightness": "precision_digits_features"},
        lambda: PictureDistances(num_draws=0),
        "fid_digits_features",
        "recall_digits_features",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    seed: int
    objective: str
    accepted: int
    trained: str
    cut: float
    domain: str = "layout"
    updates: int = UPDATES

    @property
    def where(self) -> Domain:
        """The domain."""
        return DOMAINS[self.domain]


def cells(
    domain: str,
    seeds: Sequence[int],
    accepted: Sequence[int],
    trained: Sequence[str],
    updates: Sequence[int],
    cuts: Sequence[float],
) -> Iterator[Cell]:
    """Iterate over the sweep, seed by seed."""
    for seed, objective in product(seeds, DOMAINS[domain].judges):
        for num, what, often, cut in product(accepted, trained, updates, cuts):
            yield Cell(seed, objective, num, what, cut, domain, often)


def tuner_of(cell: Cell, lora: LoRA | None) -> PGRAFT:
    """Return the tuner of a cell, set up."""
    tuner = PGRAFT(
        cell.where.pipeline(),
        cell.where.rewards()[cell.objective],
        cut=cell.cut,
        lora=lora,
        sampler=Sampler(STEPS, 1.0),
        seed=cell.seed,
        sampling_batch_size=512,
    )
    tuner.trainer = quiet_trainer()
    tuner.setup("test")
    return tuner


def conditions(tuner: PGRAFT, num: int) -> Condition:
    """Return `num` conditions of which nothing is given."""
    return tuner.pipeline.example().repeat(num)


class Drawn:
    """What a seed's cells share: candidates, their states at the cuts, and rewards.

    Args:
        domain: Its name.
        seed: Of all noise.
    """

    def __init__(self, domain: str, seed: int) -> None:
        self.domain = DOMAINS[domain]
        first = Cell(seed, next(iter(self.domain.judges)), 64, "LoRA 4", 0.0, domain)
        tuner = tuner_of(first, LoRA(4, 4))
        self.condition = conditions(tuner, (max(ACCEPTED) + HELD_OUT) * CANDIDATES)
        seeds = [seed_from(seed, 1, i) for i in range(len(self.condition))]
        keep = [STEPS - round(cut * STEPS) for cut in CUTS]
        route = tuner.reference_route()
        states = tuner.rollouts.draw(route, self.condition, seeds, keep=keep)
        self.states = dict(zip(CUTS, states, strict=True))
        self.rewards = scored(self.domain, tuner, states[0], self.condition)
        self.test = [seed_from(seed, 2, i) for i in range(TEST)]
        (x_0,) = tuner.rollouts.draw(route, conditions(tuner, TEST), self.test, keep=[STEPS])
        self.reference = measured(self.domain, tuner, x_0)

    def accepted(self, objective: str) -> Tensor:
        """Return the row of each condition's best candidate, [conditions]."""
        best = self.rewards[objective].view(-1, CANDIDATES).argmax(dim=1)
        return best + CANDIDATES * torch.arange(len(best))


def scored(domain: Domain, tuner: PGRAFT, x_0: State, condition: Condition) -> dict[str, Tensor]:
    """Return samples' rewards by name, [n] each."""
    found, rewards = defaultdict(list), domain.rewards()
    for chunk in tuner.rollouts.chunks(condition):
        samples = tuner.pipeline.decode(index(x_0, chunk.rows), chunk.condition)
        for name, reward in rewards.items():
            found[name].append(reward(samples, chunk.condition))
    return {name: torch.cat(values) for name, values in found.items()}


Measured = tuple[dict[str, Tensor], dict[str, float]]
"""Rewards of samples by name, [n] each, and the distances of their set."""


def measured(domain: Domain, tuner: PGRAFT, x_0: State) -> Measured:
    """Return the rewards of samples and the distances of their set."""
    condition, metric = conditions(tuner, TEST), domain.distances()
    features = metric.features(tuner.pipeline.decode(x_0, condition), condition)
    return scored(domain, tuner, x_0, condition), metric.compare(features)


def train(tuner: PGRAFT, cell: Cell, drawn: Drawn) -> None:
    """Fit the first accepted samples."""
    rows = drawn.accepted(cell.objective)[: cell.accepted]
    states = drawn.states[cell.cut]
    trained = [p for p in tuner.trainable().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, TRAINED[cell.trained][1], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, cell.updates)
    shuffled = torch.Generator().manual_seed(cell.seed)
    tuner.train()
    for update in range(cell.updates):
        own = rows[torch.randint(len(rows), (BATCH,), generator=shuffled)]
        seeds = [seed_from(cell.seed, 3, update, i) for i in range(BATCH)]
        loss, _ = tuner.loss(experience(states, drawn.condition, own, seeds), generators(seeds))
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    tuner.eval()


def experience(
    states: State, condition: Condition, rows: Tensor, seeds: Sequence[int]
) -> Experience:
    """Return rows of what was drawn, each with weight 1."""
    x_s = index(states, rows)
    weight = torch.ones(len(rows), device=leaves(x_s)[0].device)
    return Experience({"x_s": x_s, "weight": weight}, condition.index(rows), seeds)


@torch.no_grad()
def held_out_loss(tuner: PGRAFT, cell: Cell, drawn: Drawn) -> dict[str, float]:
    """Return (tuned - reference) / reference of the accepted law's loss by level above the cut."""
    rows = drawn.accepted(cell.objective)[-HELD_OUT:]
    x_s, condition = index(drawn.states[cell.cut], rows), drawn.condition.index(rows)
    process, found = tuner.pipeline.process, {}
    for level in LEVELS:
        if level <= tuner.tau:
            continue
        t = torch.full((HELD_OUT,), level, dtype=torch.float64)
        s = torch.full_like(t, tuner.tau)
        noise = generators([seed_from(cell.seed, 4, i) for i in range(HELD_OUT)])
        x_t = process.noised(x_s, s, t, noise)
        losses = [
            float(process.loss(denoiser(x_t, t, condition), x_s, x_t, s, t).mean())
            for denoiser in (tuner.pipeline, tuner.reference)
        ]
        found[str(level)] = losses[0] / losses[1] - 1
    return found


def compared(
    domain: Domain, tuner: PGRAFT, seeds: Sequence[int], reference: Measured
) -> dict[str, Any]:
    """Draw from a tuned model and return gains with their paired errors, and FID, of both models.

    Args:
        domain: Of the tuner.
        tuner: Trained.
        seeds: Of the test's samples.
        reference: What `measured` says of the reference's samples of the same seeds.
    """
    with torch.no_grad():
        (x_0,) = tuner.rollouts.draw(tuner.route(), conditions(tuner, TEST), seeds, keep=[STEPS])
        values, distances = measured(domain, tuner, x_0)
    before, distances_before = reference
    gains = {name: values[name] - before[name] for name in values}
    return {
        "gain": {name: float(gain.mean()) for name, gain in gains.items()},
        "sem": {name: error_of_mean(gain) for name, gain in gains.items()},
        "reference": {name: float(value.mean()) for name, value in before.items()},
        "fid": distances[domain.fid],
        "fid_reference": distances_before[domain.fid],
        "distances": distances,
        "distances_reference": distances_before,
    }


def run(cell: Cell, drawn: Drawn) -> dict[str, Any]:
    """Train and measure one cell."""
    start, tuner = time.process_time(), tuner_of(cell, TRAINED[cell.trained][0])
    train(tuner, cell, drawn)
    own = compared(cell.where, tuner, drawn.test, drawn.reference)
    own |= {"held_out_loss": held_out_loss(tuner, cell, drawn)}
    return asdict(cell) | own | {"processor_seconds": time.process_time() - start}


def sweep(out: Path, wanted: Iterator[Cell]) -> None:
    """Run what is not in the file yet."""
    known = {cell_of(line) for line in read_lines(out)}
    drawn: tuple[tuple[str, int], Drawn] | None = None
    for cell in wanted:
        if cell in known:
            continue
        own = (cell.domain, cell.seed)
        if drawn is None or drawn[0] != own:
            with torch.no_grad():
                drawn = (own, Drawn(*own))
        result = run(cell, drawn[1])
        append_lines(out, json.dumps(result) + "\n")
        print(cell, f"{result['gain'][cell.objective]:+.3f}, FID {result['fid']:.1f}", flush=True)


def cell_of(line: Mapping[str, Any]) -> Cell:
    """Return the cell of a line of results."""
    return Cell(**{name: line[name] for name in Cell.__dataclass_fields__ if name in line})


Columns = tuple[float, float, float, float]
"""Of a table: see `columns_of`."""


def columns_of(line: Mapping[str, Any]) -> Columns:
    """Return the gain of the trained reward, then changes of FID, judge and recall, NaN without."""
    cell, gain = cell_of(line), line["gain"]

    def change(name: str | None) -> float:
        both = (line.get("distances", {}), line.get("distances_reference", {}))
        return both[0][name] - both[1][name] if name in both[0] else math.nan

    judge = cell.where.judges[cell.objective]
    fid = line["fid"] - line["fid_reference"]
    return gain[cell.objective], fid, gain.get(judge, change(judge)), change(cell.where.recall)


Group = tuple[str, str, int, str, int, float]


def grouped(out: Path) -> dict[Group, dict[int, Columns]]:
    """Return the columns of all seeds by what the cells have in common."""
    groups: dict[Group, dict[int, Columns]] = defaultdict(dict)
    for line in read_lines(out):
        cell = cell_of(line)
        own = (cell.domain, cell.objective, cell.accepted, cell.trained, cell.updates, cell.cut)
        groups[own][cell.seed] = columns_of(line)
    return dict(sorted(groups.items()))


_HEAD = (
    "| domain | reward | accepted | trained | updates | f "
    "| gain | change of FID | judge | recall | seeds |"
)
_HEAD += f"\n{'| --- ' * (_HEAD.count('|') - 1)}|"


def table(out: Path) -> None:
    """Print gain and changes of FID, judge and recall, mean over seeds and standard error."""
    print(_HEAD)
    for group, seeds in grouped(out).items():
        print_row(group, list(seeds.values()))


def versus(out: Path) -> None:
    """Print by how much each cut differs from f = 0: mean over seeds and standard error."""
    groups = grouped(out)
    print(_HEAD)
    for group, seeds in groups.items():
        whole = groups.get((*group[:-1], 0.0), {})
        shared = sorted(seeds.keys() & whole.keys())
        if group[-1] and shared:
            pairs = [zip(seeds[seed], whole[seed], strict=True) for seed in shared]
            print_row(group, [tuple(cut - none for cut, none in pair) for pair in pairs])


def print_row(group: Group, columns: Sequence[Sequence[float]]) -> None:
    """Print a line of a table."""
    domain, objective, accepted, trained, updates, cut = group
    numbers = " | ".join(mean_and_error(values) for values in zip(*columns, strict=True))
    cells = f"| {domain} | {objective} | {accepted:,} | {trained} | {updates} | {cut} |"
    print(f"{cells} {numbers} | {len(columns)} |")


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean over runs with its standard error, if there are two or more; "" of NaN."""
    if math.isnan(values[0]):
        return ""
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.3f} ± {error:.3f}"


def main() -> None:
    """Run the sweep, or print a table of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["run", "table", "versus"])
    parser.add_argument("--out", type=Path, default=Path("cut_regimes.jsonl"))
    parser.add_argument("--domain", choices=list(DOMAINS), default="layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accepted", type=int, nargs="+", default=ACCEPTED, choices=ACCEPTED)
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--updates", type=int, nargs="+", default=[UPDATES])
    parser.add_argument("--cuts", type=float, nargs="+", default=CUTS, choices=CUTS)
    options = parser.parse_args()
    if options.what == "run":
        fitted = (options.accepted, options.trained, options.updates, options.cuts)
        sweep(options.out, cells(options.domain, options.seeds, *fitted))
    else:
        {"table": table, "versus": versus}[options.what](options.out)


if __name__ == "__main__":
    main()
