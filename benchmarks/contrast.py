r"""What contrast with the rejected adds to GRAFT's loss, as a control variate, on layouts.

With candidates i of a condition, acceptance a_i and denoising loss l_i, the published loss is
sum a_i l_i. Its gradient at the reference is that of sum (a_i - mean(a)) l_i plus mean(a) times
that of sum l_i. The last term holds no reward: it is the error of the sampler's own samples, 0 for
an exact sampler of a perfectly fitted model, and noise on top.

`snr` measures this at the reference, over all weights: the squared length of the mean gradient
(unbiased, from products of different batches) and the variance of batches of 16 conditions, for the
published loss, its two terms, the bounded contrast of P-GRAFT (noise shared by a condition's
candidates) and DiffusionNFT's loss.

`curves` trains each loss from the reference on the same 4 candidates of 1,024, 4,096, ... pages, 4
passes of 64 pages an update, LoRA of rank 16, AdamW with a learning rate falling linearly to 0. It
is chosen per loss among three at 4,096 pages with a seed of its own, by the gain, unless `--rate`
gives it. The contrast has strength 16; "contrast 2" and "contrast 4" have those. The control
variate a_i l_i(f) - mean(a) (l_i(f) - l_i(2 f_ref - f)) / 2 takes away, wherever f is, the gradient
that all candidates have at the reference: with a perfectly fitted model it has the gradient of the
published loss in the mean. Test: 1,024 pages, paired with the reference's.

    python benchmarks/contrast.py snr --out contrast.jsonl
    python benchmarks/contrast.py curves --out contrast.jsonl --seeds 0 1 2
    python benchmarks/contrast.py curves --out contrast.jsonl --losses "contrast 2" "contrast 4" \
        --pages 1024 4096
    python benchmarks/contrast.py table --out contrast.jsonl
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cut_regimes import (
    DOMAINS,
    STEPS,
    TEST,
    Cell,
    Measured,
    compared,
    conditions,
    mean_and_error,
    measured,
    tuner_of,
)
from torch import Tensor

from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.nft import contrastive_loss
from lit_rlft.core.implicit import group_probabilities
from lit_rlft.core.process import Process
from lit_rlft.core.randomness import generators, rand_like, seed_from
from lit_rlft.core.state import index
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA
from lit_rlft.runs.lines import append_lines, read_lines

LAYOUT = DOMAINS["layout"]
M, GROUPS, PASSES, SEARCH_SEED, SEARCHED = 4, 64, 4, 100, 4096
PAGES = (1024, 4096, 16384)
RATES = (3e-4, 1e-3, 3e-3)
STRENGTH = 16.0
Part = tuple[Tensor, Sequence[int]]
"""Rows of candidates, whole groups, and the seeds of their noise."""


class Store:
    """Candidates of the reference and their rewards.

    Args:
        tuner: Draws from its reference with noise of its seed, and scores.
        groups: Number of groups of M candidates.
    """

    def __init__(self, tuner: PGRAFT, groups: int) -> None:
        self.condition = conditions(tuner, groups * M)
        seeds = [seed_from(tuner.seed, 1, i) for i in range(groups * M)]
        with torch.no_grad():
            route = tuner.reference_route()
            (self.x_0,) = tuner.rollouts.draw(route, self.condition, seeds, keep=[STEPS])
            rewards = tuner.rollouts.score(self.x_0, self.condition).rewards.view(-1, M)
        best = rewards.argmax(dim=1, keepdim=True)
        self.accepted = torch.zeros_like(rewards).scatter(1, best, 1.0).flatten()
        spread = float((rewards - rewards.mean(dim=1, keepdim=True)).double().std(correction=0))
        self.good = group_probabilities(rewards.double(), spread, 1.0).flatten().float()


def base(seed: int, objective: str, lora: LoRA | None = LoRA(16, 16)) -> PGRAFT:
    """Return GRAFT on the layout model."""
    return tuner_of(Cell(seed, objective, 0, "LoRA 16", 0.0), lora)


def test_seeds(seed: int) -> list[int]:
    """Return the seeds of the test's samples."""
    return [seed_from(seed, 2, i) for i in range(TEST)]


@torch.no_grad()
def reference(tuner: PGRAFT) -> Measured:
    """Return what the reference's samples of the test are worth."""
    condition, seeds = conditions(tuner, TEST), test_seeds(tuner.seed)
    (x_0,) = tuner.rollouts.draw(tuner.reference_route(), condition, seeds, keep=[STEPS])
    return measured(LAYOUT, tuner, x_0)


def weighted(weight: Callable[[Store, Tensor], Tensor], contrast: float = 0.0) -> "Loss":
    """Return a loss of `PGRAFT` with weights of its own; the loss's sum over candidates."""

    def loss(tuner: PGRAFT, store: Store, part: Part) -> Tensor:
        rows, seeds = part
        weights = weight(store, rows)
        if not contrast:  # what has no weight is left out
            kept = weights.nonzero().flatten()
            rows, weights = rows[kept], weights[kept]
            seeds = [seeds[i] for i in kept.tolist()]
        tuner.contrast = contrast
        states = {"x_s": index(store.x_0, rows), "weight": weights}
        own = Experience(states, store.condition.index(rows), seeds)
        losses = tuner.loss(own, generators(seeds))[0]  # of the size of the weights
        return (losses if contrast else losses * weights.sign()).sum()

    return loss


def mirrored(weights: Callable[[Store, Tensor], tuple[Tensor, Tensor]]) -> "Loss":
    """Return u l(f) + v l(2 f_ref - f), summed over candidates, of their weights u and v."""

    def loss(tuner: PGRAFT, store: Store, part: Part) -> Tensor:
        rows, seeds = part
        process: Process = tuner.pipeline.process
        x_0, noise = index(store.x_0, rows), generators(seeds)
        t = process.draw_times(rand_like(torch.empty(len(rows)), noise))
        x_t = process.noised(x_0, torch.zeros_like(t), t, noise)
        condition = store.condition.index(rows)
        with torch.no_grad():
            old = tuner.reference(x_t, t, condition)
        prediction = tuner.pipeline(x_t, t, condition)
        ahead, behind = (
            contrastive_loss(process, prediction, old, x_0, x_t, t, good, 1.0)
            for good in (torch.ones_like(t), torch.zeros_like(t))
        )
        u, v = weights(store, rows)
        return (u * ahead + v * behind).sum()

    return loss


Loss = Callable[[PGRAFT, Store, Part], Tensor]


def accepted(store: Store, rows: Tensor) -> Tensor:
    return store.accepted[rows]


def apart(store: Store, rows: Tensor) -> Tensor:
    return store.accepted[rows] - 1 / M


def everything(store: Store, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), 1 / M)


def likely(store: Store, rows: Tensor) -> tuple[Tensor, Tensor]:
    # DiffusionNFT's at beta = 1, with the reference as the old policy
    good = store.good[rows]
    return good, 1 - good


def corrected(store: Store, rows: Tensor) -> tuple[Tensor, Tensor]:
    # (l(f) - l(2 f_ref - f)) / 2 has the gradient that l has at the reference, for every f
    return store.accepted[rows] - 0.5 / M, torch.full((len(rows),), 0.5 / M)


LOSSES: dict[str, Loss] = {
    "published": weighted(accepted),
    "contrast": weighted(apart, STRENGTH),
    "DiffusionNFT": mirrored(likely),
    "contrast 2": weighted(apart, 2.0),
    "contrast 4": weighted(apart, 4.0),
    "control variate": mirrored(corrected),
}
ALIKE = ("contrast", "contrast 2", "contrast 4", "control variate")
"""Losses of which a condition's candidates are noised alike."""
FIRST = ("published", "contrast", "DiffusionNFT")
"""What is measured unless `--losses` says otherwise."""
TERMS: dict[str, Loss] = {name: LOSSES[name] for name in FIRST} | {
    "a - mean(a), noise apart": weighted(apart),
    "mean(a), no reward": weighted(everything),
}


def parts_of(groups: Tensor, seed: int, update: int, *, alike: bool) -> Part:
    """Return the candidates of groups; noise alike has one seed for a group."""
    rows = (groups.unsqueeze(1) * M + torch.arange(M)).flatten()
    own = range(len(rows))
    return rows, [seed_from(seed, 3, update, i - i % M if alike else i) for i in own]


def snr(
    out: Path, tuner: PGRAFT, line: dict[str, Any], batches: int = 384, groups: int = 16
) -> None:
    """Measure the gradients of all weights at the reference.

    Args:
        out: Receives a line per loss.
        tuner: Trains all weights.
        line: What else each line says.
        batches: Number of batches of different conditions.
        groups: Number of conditions of a batch.
    """
    store = Store(tuner, batches * groups)
    tuner.train()
    trained = [p for p in tuner.trainable().parameters() if p.requires_grad]
    for name, loss in TERMS.items():
        gradients = []
        for k in range(batches):
            own = torch.arange(k * groups, (k + 1) * groups)
            part = parts_of(own, tuner.seed, k, alike=name in ALIKE)
            grads = torch.autograd.grad(
                loss(tuner, store, part) / groups, trained, allow_unused=True
            )
            gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
        signal, error, noise = products(torch.stack(gradients))
        found = {"loss": name, "signal": signal, "error": error, "noise": noise}
        write(out, {"what": "snr", **line, **found, "batch": groups, "batches": batches})


def products(gradients: Tensor) -> tuple[float, float, float]:
    """Return |E g|^2, unbiased, its error, and the trace of g's covariance, from draws [K, D]."""
    k, inner = len(gradients), (gradients @ gradients.T).double()
    lengths, rows = inner.diagonal(), inner.sum(dim=1)
    pairs = inner.sum() - lengths.sum()
    signal = float(pairs / (k * (k - 1)))
    without = (pairs - 2 * (rows - lengths)) / ((k - 1) * (k - 2))
    error = float((without - without.mean()).square().sum() * (k - 1) / k) ** 0.5
    return signal, error, float(lengths.mean()) - signal


def train(tuner: PGRAFT, store: Store, name: str, groups: int, rate: float) -> None:
    """Train a loss on the first groups of the store, with the noise of the tuner's seed."""
    trained = [p for p in tuner.trainable().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    updates = PASSES * groups // GROUPS
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    shuffled = torch.Generator().manual_seed(tuner.seed)
    tuner.train()
    for update in range(updates):
        if not (at := update % (groups // GROUPS)):
            order = torch.randperm(groups, generator=shuffled)
        own = order[at * GROUPS : (at + 1) * GROUPS]
        part = parts_of(own, tuner.seed, update, alike=name in ALIKE)
        optimizer.zero_grad()
        (LOSSES[name](tuner, store, part) / GROUPS).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    tuner.eval()


def curves(out: Path, options: argparse.Namespace) -> None:
    """Search each loss's rate, then train at all sizes; what is in the file is not repeated."""
    losses, objective, pages = options.losses, options.objective, options.pages
    searched = () if options.rate else RATES
    jobs = [("search", SEARCH_SEED, loss, SEARCHED, rate) for loss in losses for rate in searched]
    jobs += [
        ("curve", seed, loss, num, None)
        for seed in options.seeds
        for num in pages
        for loss in losses
    ]
    held: tuple[int, Store, Measured] | None = None
    for what, seed, loss, num, given in jobs:
        rate = given or options.rate or best_rate(out, loss, objective)
        line = {"what": what, "seed": seed, "objective": objective}
        line |= {"loss": loss, "pages": num, "rate": rate}
        if any(line.items() <= known.items() for known in read_lines(out)):
            continue
        if held is None or held[0] != seed:
            size, tuner = SEARCHED if what == "search" else max(pages), base(seed, objective)
            held = (seed, Store(tuner, size), reference(tuner))
        start, tuner = time.process_time(), base(seed, objective)
        train(tuner, held[1], loss, num, rate)
        line |= compared(LAYOUT, tuner, test_seeds(seed), held[2])
        write(out, line | {"processor_seconds": time.process_time() - start})


def best_rate(out: Path, loss: str, objective: str) -> float:
    """Return the rate that gained most in the search."""
    tried = {
        line["rate"]: line["gain"][objective]
        for line in read_lines(out)
        if line["what"] == "search" and (line["loss"], line["objective"]) == (loss, objective)
    }
    return max(tried, key=lambda rate: tried[rate])


def write(out: Path, line: dict[str, Any]) -> None:
    """Append a line and show it."""
    append_lines(out, json.dumps(line) + "\n")
    print(line, flush=True)


def table(out: Path) -> None:
    """Print both tables."""
    lines = list(read_lines(out))
    print("| loss | mean gradient, squared | variance of a batch | ratio |\n|---|---|---|---|")
    for line in lines:
        if line["what"] == "snr":
            signal, error, noise = line["signal"], line["error"], line["noise"]
            share = f"{signal / noise:.4f} ± {error / noise:.4f}"
            print(f"| {line['loss']} | {signal:.3g} | {noise:.3g} | {share} |")
    print("\n| pages | loss | rate | gain | change of FID | critic |\n|---|---|---|---|---|---|")
    found: dict[tuple[int, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["what"] == "curve":
            found[line["pages"], line["loss"], line["rate"]].append(line)
    for (pages, loss, rate), own in sorted(found.items()):
        columns = (
            [line["gain"][line["objective"]] for line in own],
            [line["fid"] - line["fid_reference"] for line in own],
            [line["gain"]["critic"] for line in own],
        )
        print(f"| {pages:,} | {loss} | {rate:g} | {' | '.join(map(mean_and_error, columns))} |")


def main() -> None:
    """Measure, train, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["snr", "curves", "table"])
    parser.add_argument("--out", type=Path, default=Path("contrast.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pages", type=int, nargs="+", default=list(PAGES))
    parser.add_argument("--rate", type=float, help="learning rate, instead of a search")
    parser.add_argument("--objective", choices=["page", "coverage"], default="page")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(FIRST))
    options = parser.parse_args()
    if options.what == "snr":
        line = {"seed": options.seeds[0], "objective": options.objective}
        snr(options.out, base(**line, lora=None), line)
    elif options.what == "curves":
        curves(options.out, options)
    else:
        table(options.out)


if __name__ == "__main__":
    main()
