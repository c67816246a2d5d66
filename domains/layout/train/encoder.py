"""Trains a layout encoder on the page grammar: real or jittered, and give every element back.

    python -m domains.layout.train.encoder --name encoder --seed 0
    python -m domains.layout.train.encoder --name critic --seed 1

The two are the same network from different seeds: what judges samples (FID) must not be what they
are trained for (the critic).
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from domains.layout import EMBEDDED
from domains.layout.networks.encoder import LayoutEncoder, jittered
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar
from domains.layout.sources.packed import Packed
from lit_rlft.kit.training import minimise

BATCH_SIZE, LEARNING_RATE, NUM_WARM_UP = 128, 1.5e-3, 100
NUM_PAGES, NUM_HELD_OUT = 32768, 2048
STD = (0.002, 0.05)  # of the jitter, in pages; log-uniform
MAX_GRAD_NORM = 1.0


def layouts_of(packed: Packed, classes: tuple[str, ...]) -> Layouts:
    """Return packed layouts as the domain's samples."""
    labels = torch.from_numpy(packed.labels.copy()).long()
    return Layouts.of(torch.from_numpy(packed.boxes.copy()), labels, classes)


def question(real: Layouts, generator: torch.Generator) -> tuple[Layouts, Tensor]:
    """Return the layouts, about half of them jittered, and 1 for those that are not."""
    low, high = (math.log(std) for std in STD)
    uniform = torch.rand(2, len(real), generator=generator)
    answers = (uniform[0] < 0.5).float()
    stds = torch.exp(low + (high - low) * uniform[1]) * (1 - answers)
    return jittered(real, stds, generator), answers


def losses(network: LayoutEncoder, layouts: Layouts, answers: Tensor) -> Tensor:
    """Return the loss: real or not, each label, each box."""
    features = network(layouts)
    logits, boxes = network.reconstruct(features, ~layouts.valid)
    valid = layouts.valid
    real = functional.binary_cross_entropy_with_logits(network.logits(features), answers)
    label = functional.cross_entropy(logits[valid], layouts.labels[valid] + 1)
    box = functional.mse_loss(boxes[valid], network.boxes_of(layouts)[valid])
    return real + 0.5 * label + 20 * box


@torch.no_grad()
def accuracy(network: LayoutEncoder, real: Layouts, std: float) -> float:
    """Return the share of right answers to pages, half of them jittered by `std`."""
    generator = torch.Generator().manual_seed(1)
    shaken = jittered(real, torch.full((len(real),), std), generator)
    right = [(network.logits(network(real)) > 0), (network.logits(network(shaken)) < 0)]
    return float(torch.cat(right).float().mean())


def train(num_steps: int, seed: int) -> LayoutEncoder:
    """Train a network and return it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = LayoutEncoder()
    pages = layouts_of(Grammar(NUM_PAGES, seed=seed).load(), network.classes)

    def loss() -> Tensor:
        rows = torch.randint(len(pages), (BATCH_SIZE,), generator=generator)
        return losses(network, *question(pages.index(rows), generator))

    minimise(
        network,
        loss,
        num_steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        num_warm_up=NUM_WARM_UP,
        max_grad_norm=MAX_GRAD_NORM,
        print_every=500,
    )
    return network.eval()


def main() -> None:
    """Train, measure on held-out pages, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="encoder", help="folder of assets/ to write to")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of all assets")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser updates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.process_time()
    network = train(options.steps, options.seed)
    held_out = layouts_of(Grammar(NUM_HELD_OUT, seed=10_000).load(), network.classes)
    for std in (0.002, 0.005, 0.01, 0.02, 0.05):
        print(f"jitter {std}: {100 * accuracy(network, held_out, std):.1f} % right")
    network.save(options.out / options.name)
    print(f"{options.out / options.name}, {time.process_time() - start:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
