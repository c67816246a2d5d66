"""Trains a feature network to say what images show.

    python -m domains.image.train.features --data digits --name digits_features --seed 0
    python -m domains.image.train.features --data digits --name digits_classifier --seed 1
    python -m domains.image.train.features --data shapes.npz --name shapes_features --seed 0

`--data` is an `.npz` with `images`, `labels` (int [n], or bool [n, K] where several classes may be
shown) and optionally `classes`, their names. The features judge samples (FID), the classifier
rewards them: they are the same network from different seeds.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from domains.image.networks.features import EMBEDDED, FeatureArchitecture, FeatureNetwork
from domains.image.sources import Arrays, Digits
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.training import minimise

BATCH_SIZE, LEARNING_RATE, NUM_WARM_UP = 128, 2e-3, 50
MAX_SHIFT = 1  # pixels, of the augmentation
HELD_OUT = 0.1


def read(data: str) -> tuple[Tensor, Tensor, list[str]]:
    """Return pixels uint8 [n, C, H, W], labels (int64 [n] or float [n, K]) and class names."""
    images = Digits().load() if data == "digits" else Arrays(data).load()
    if images.labels is None:
        raise UsageError(f"--data: {data} has no labels; add an array of that name")
    labels = torch.from_numpy(np.asarray(images.labels))
    labels = labels.float() if labels.dim() == 2 else labels.long()
    num = labels.shape[1] if labels.dim() == 2 else int(labels.max()) + 1
    classes = [str(i) for i in range(num)]
    if data != "digits":
        with np.load(data) as file:
            classes = [str(name) for name in file["classes"]] if "classes" in file else classes
    return torch.from_numpy(np.array(images.pixels)), labels, classes


def shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures moved by up to a pixel each way, borders repeated."""
    dy, dx = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator).tolist()
    padded = functional.pad(pictures, (MAX_SHIFT,) * 4, mode="replicate")
    height, width = pictures.shape[-2:]
    top, left = MAX_SHIFT + dy, MAX_SHIFT + dx
    return padded[..., top : top + height, left : left + width]


def loss_of(network: FeatureNetwork, pictures: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the labels."""
    logits = network.logits(network(pictures))
    if network.architecture.exclusive:
        return functional.cross_entropy(logits, labels)
    return functional.binary_cross_entropy_with_logits(logits, labels)


@torch.no_grad()
def accuracy(network: FeatureNetwork, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, over images and, of several, over classes."""
    right = []
    for part, known in zip(pixels.split(512), labels.split(512), strict=True):  # type: ignore[no-untyped-call]
        logits = network.logits(network(part.float() / 255))
        exclusive = network.architecture.exclusive
        right.append(logits.argmax(1) == known if exclusive else (logits > 0) == (known > 0.5))
    return float(torch.cat(right).float().mean())


def train(
    network: FeatureNetwork, pixels: Tensor, labels: Tensor, num_steps: int, seed: int
) -> FeatureNetwork:
    """Train a network and return it."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        return loss_of(network, shifted(pixels[rows].float() / 255, generator), labels[rows])

    minimise(
        network,
        loss,
        num_steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.02,
        num_warm_up=NUM_WARM_UP,
    )
    return network.eval()


def main() -> None:
    """Train, measure on held-out images, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help="'digits' or an .npz with labels")
    parser.add_argument("--name", required=True, help="folder of --out to write to")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of all assets")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser updates")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.process_time()
    pixels, labels, classes = read(options.data)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    num_held_out = round(HELD_OUT * len(pixels))
    held_out, known = order[:num_held_out], order[num_held_out:]
    torch.manual_seed(options.seed)
    architecture = FeatureArchitecture(
        size=pixels.shape[-1],
        channels=1 if pixels.shape[1] == 1 else 3,
        classes=classes,
        exclusive=labels.dim() == 1,
        widths=options.widths,
    )
    network = FeatureNetwork(architecture, options.name)
    train(network, pixels[known], labels[known], options.steps, options.seed)
    share = accuracy(network, pixels[held_out], labels[held_out])
    print(f"{100 * share:.2f} % right of {num_held_out} held-out images")
    network.save(options.out / options.name)
    print(f"{options.out / options.name}, {time.process_time() - start:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
