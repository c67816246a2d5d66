"""When does P-GRAFT beat GRAFT? The cut f by accepted samples and by what is trained, on layouts.

Method: per seed the pretrained layout model draws 8 candidates for each of 4,096 + 512 pages once,
with 20 ancestral steps, and keeps x_0 and x_tau of every cut. A reward accepts the best of each 8;
the published loss alone (accepted samples, no contrast) fits the first n of them in 200 updates of
128, AdamW, learning rate falling linearly to 0. Then 1,024 pages are drawn, the reference's share f
of the steps by the reference, with the noise of as many pages of the reference. Recorded: gain in
the trained reward with its paired error, the change of FID and of held-out rewards, and on 512
accepted pages that were not trained on the loss at five noise levels, tuned - reference, in units
of the reference's. One process runs all, one line of JSON per cell; what is there is kept,
so that an interrupted benchmark goes on where it stopped.

    python benchmarks/cut_regimes.py run --out cut_regimes.jsonl --seeds 0 1 2
    python benchmarks/cut_regimes.py table --out cut_regimes.jsonl

Rewards: `page`, the domain's own (alignment weighs most: edges in line, decided by the last steps),
and `coverage` (decided early). `lit-rlft profile --config layout --config p_graft` shows when.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quiet import quiet_trainer
from torch import Tensor

from domains.layout.metrics import SetDistances
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Alignment, Coverage, Critic, InsidePage, Overlap
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.pipeline import Condition
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


def rewards() -> dict[str, Reward]:
    """Return the rewards that are trained for or held out."""
    parts = {"overlap": Overlap(), "alignment": Alignment(), "coverage": Coverage()}
    page = WeightedSum(parts | {"inside": InsidePage()}, {"alignment": 10.0, "coverage": 0.5})
    return {"page": page, "coverage": Coverage(), "overlap": Overlap(), "critic": Critic()}


OBJECTIVES = ("page", "coverage")


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    seed: int
    objective: str
    accepted: int
    trained: str
    cut: float


def cells(seeds: Sequence[int], objectives: Sequence[str]) -> Iterator[Cell]:
    """Iterate over the sweep, seed by seed."""
    for seed in seeds:
        for objective in objectives:
            for accepted in ACCEPTED:
                for trained in TRAINED:
                    for cut in CUTS:
                        yield Cell(seed, objective, accepted, trained, cut)


def tuner_of(cell: Cell, lora: LoRA | None) -> PGRAFT:
    """Return the tuner of a cell, set up."""
    tuner = PGRAFT(
        LayoutPipeline("grammar"),
        Coverage(),
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
    """Return `num` pages of which nothing is given."""
    return tuner.pipeline.example().repeat(num)


class Drawn:
    """What a seed's cells share: candidates, their states at the cuts, and rewards.

    Args:
        seed: Of all noise.
    """

    def __init__(self, seed: int) -> None:
        tuner = tuner_of(Cell(seed, "page", 64, "LoRA 4", 0.0), LoRA(4, 4))
        self.condition = conditions(tuner, (max(ACCEPTED) + HELD_OUT) * CANDIDATES)
        seeds = [seed_from(seed, 1, i) for i in range(len(self.condition))]
        keep = [STEPS - round(cut * STEPS) for cut in CUTS]
        route = tuner.reference_route()
        states = tuner.rollouts.draw(route, self.condition, seeds, keep=keep)
        self.states = dict(zip(CUTS, states, strict=True))
        self.rewards = scored(tuner, states[0], self.condition)
        self.test = [seed_from(seed, 2, i) for i in range(TEST)]
        (x_0,) = tuner.rollouts.draw(route, conditions(tuner, TEST), self.test, keep=[STEPS])
        self.reference = measured(tuner, x_0)

    def accepted(self, objective: str) -> Tensor:
        """Return the row of each page's best candidate, [pages]."""
        best = self.rewards[objective].view(-1, CANDIDATES).argmax(dim=1)
        return best + CANDIDATES * torch.arange(len(best))


def scored(tuner: PGRAFT, x_0: State, condition: Condition) -> dict[str, Tensor]:
    """Return samples' rewards by name, [n] each."""
    found = defaultdict(list)
    for chunk in tuner.rollouts.chunks(condition):
        samples = tuner.pipeline.decode(index(x_0, chunk.rows), chunk.condition)
        for name, reward in rewards().items():
            found[name].append(reward(samples, chunk.condition))
    return {name: torch.cat(values) for name, values in found.items()}


def measured(tuner: PGRAFT, x_0: State) -> tuple[dict[str, Tensor], float]:
    """Return the rewards of samples and their FID."""
    condition = conditions(tuner, TEST)
    metric = SetDistances(num_draws=0)
    features = metric.features(tuner.pipeline.decode(x_0, condition), condition)
    return scored(tuner, x_0, condition), metric.compare(features)["fid"]


def train(tuner: PGRAFT, cell: Cell, drawn: Drawn) -> None:
    """Fit the first accepted pages."""
    rows = drawn.accepted(cell.objective)[: cell.accepted]
    states = drawn.states[cell.cut]
    trained = [p for p in tuner.trainable().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, TRAINED[cell.trained][1], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, UPDATES)
    shuffled = torch.Generator().manual_seed(cell.seed)
    tuner.train()
    for update in range(UPDATES):
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
    tuner: PGRAFT, seeds: Sequence[int], reference: tuple[dict[str, Tensor], float]
) -> dict[str, Any]:
    """Draw from a tuned model and return gains with their paired errors, and FID, of both models.

    Args:
        tuner: Trained.
        seeds: Of the test's samples.
        reference: What `measured` says of the reference's samples of the same seeds.
    """
    with torch.no_grad():
        (x_0,) = tuner.rollouts.draw(tuner.route(), conditions(tuner, TEST), seeds, keep=[STEPS])
        values, fid = measured(tuner, x_0)
    before, fid_before = reference
    gains = {name: values[name] - before[name] for name in values}
    return {
        "gain": {name: float(gain.mean()) for name, gain in gains.items()},
        "sem": {name: error_of_mean(gain) for name, gain in gains.items()},
        "reference": {name: float(value.mean()) for name, value in before.items()},
        "fid": fid,
        "fid_reference": fid_before,
    }


def run(cell: Cell, drawn: Drawn) -> dict[str, Any]:
    """Train and measure one cell."""
    start, tuner = time.process_time(), tuner_of(cell, TRAINED[cell.trained][0])
    train(tuner, cell, drawn)
    own = compared(tuner, drawn.test, drawn.reference)
    own |= {"held_out_loss": held_out_loss(tuner, cell, drawn)}
    return asdict(cell) | own | {"processor_seconds": time.process_time() - start}


def sweep(out: Path, seeds: Sequence[int], objectives: Sequence[str]) -> None:
    """Run what is not in the file yet."""
    names = Cell.__dataclass_fields__
    known = {Cell(**{name: line[name] for name in names}) for line in read_lines(out)}
    drawn: tuple[int, Drawn] | None = None
    for cell in cells(seeds, objectives):
        if cell in known:
            continue
        if drawn is None or drawn[0] != cell.seed:
            with torch.no_grad():
                drawn = (cell.seed, Drawn(cell.seed))
        result = run(cell, drawn[1])
        append_lines(out, json.dumps(result) + "\n")
        print(cell, f"{result['gain'][cell.objective]:+.3f}, FID {result['fid']:.1f}", flush=True)


def table(out: Path) -> None:
    """Print gain, change of FID and of the critic, mean over seeds and standard error."""
    groups: dict[tuple[str, int, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(out):
        groups[line["objective"], line["accepted"], line["trained"], line["cut"]].append(line)
    print("| reward | accepted | trained | f | gain | change of FID | critic | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (objective, accepted, trained, cut), lines in sorted(groups.items(), key=str):
        columns = (
            [line["gain"][objective] for line in lines],
            [line["fid"] - line["fid_reference"] for line in lines],
            [line["gain"]["critic"] for line in lines],
        )
        numbers = " | ".join(map(mean_and_error, columns))
        print(f"| {objective} | {accepted:,} | {trained} | {cut} | {numbers} | {len(lines)} |")


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean over runs with its standard error, if there are two or more."""
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.3f} ± {error:.3f}"


def main() -> None:
    """Run the sweep, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("cut_regimes.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options = parser.parse_args()
    if options.what == "table":
        table(options.out)
    else:
        sweep(options.out, options.seeds, options.objectives)


if __name__ == "__main__":
    main()
