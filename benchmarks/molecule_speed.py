"""Seconds of sampling molecules, and training throughput with and without empty slots.

Method, on one thread, for the explicit and the heavy preset on enumerated molecules: (1) sampling
by the embedded model, the molecules' numbers of atoms drawn from the training data, best of three.
(2) Training steps (noise, forward, backward, AdamW) on batches of one size, as the data module
makes them, and on shuffled batches with every molecule padded to the most atoms of the preset;
molecules per CPU-second over equal numbers of batches, in turns.

    python benchmarks/molecule_speed.py
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domains.molecule.chemistry.elements import HEAVY
from domains.molecule.data import MoleculeData
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.sources import Enumerated, Source
from lit_rlft.core.sampling import Sampler

PRESETS: dict[str, Source] = {
    "small": Enumerated(max_heavy=6),
    "heavy": Enumerated(max_heavy=9, num_attempts=30_000, elements=HEAVY),
}
Batches = list[Mapping[str, Any]]


def batches_of(source: Source, num: int, batch_size: int, bucketed: bool) -> Batches:
    """Return the first training batches."""
    data = MoleculeData(source, batch_size=batch_size, bucketed=bucketed)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(num)]


@torch.no_grad()
def sampling(pipeline: MoleculePipeline, sizes: Tensor, num_steps: int) -> float:
    """Return CPU-seconds of drawing one molecule per entry of `sizes`."""
    condition = pipeline.encode({"num_atoms": sizes})
    start = time.process_time()
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample()
    x_0 = Sampler(num_steps).sample(pipeline, pipeline.process, x_1, condition)
    pipeline.decode(x_0, condition)
    return time.process_time() - start


def step(
    pipeline: MoleculePipeline,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    padded: bool,
) -> float:
    """Make one update; return its CPU-seconds."""
    start = time.process_time()
    condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
    s, t = torch.zeros(len(condition)), torch.rand(len(condition)).clamp(min=0.01)
    x_t = pipeline.process.noised(x_0, s, t)
    if padded:
        most = pipeline.architecture.max_atoms
        prediction = pipeline._predict(x_t, t, most, condition.table("num_atoms"))
    else:
        prediction = pipeline.predict(x_t, t, condition)
    optimizer.zero_grad()
    pipeline.process.loss(prediction, x_0, x_t, s, t).mean().backward()
    optimizer.step()
    return time.process_time() - start


def training(pipeline: MoleculePipeline, alike: Batches, mixed: Batches) -> tuple[float, float]:
    """Return molecules per CPU-second, in batches of one size and padded."""
    optimizer = torch.optim.AdamW(pipeline.denoiser.parameters(), lr=1e-4)
    seconds = [0.0, 0.0]
    for same, other in zip(alike, mixed, strict=True):
        seconds[0] += step(pipeline, optimizer, same, padded=False)
        seconds[1] += step(pipeline, optimizer, other, padded=True)
    num = sum(len(batch["index"]) for batch in alike)
    return num / seconds[0], num / seconds[1]


def main() -> None:
    """Run what the command line asks for and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=300, help="molecules to sample")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--batches", type=int, default=40, help="training batches of each kind")
    parser.add_argument("--batch-size", type=int, default=64)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for name, source in PRESETS.items():
        torch.manual_seed(0)
        pipeline = MoleculePipeline(name)
        alike, mixed = (
            batches_of(source, settings.batches, settings.batch_size, bucketed)
            for bucketed in (True, False)
        )
        sizes = torch.cat([batch["num_atoms"] for batch in mixed])[: settings.num]
        best = min(sampling(pipeline, sizes, settings.steps) for _ in range(3))
        print(
            f"{name}: {len(sizes)} molecules of {sizes.float().mean():.1f} atoms (at most "
            f"{int(sizes.max())}) in {settings.steps} steps: {best:.2f} CPU-seconds"
        )
        bucketed, padded = training(pipeline, alike, mixed)
        print(
            f"{name}: training {bucketed:.0f} molecules per CPU-second in batches of one size, "
            f"{padded:.0f} padded to {pipeline.architecture.max_atoms}: {bucketed / padded:.2f} "
            "times"
        )


if __name__ == "__main__":
    main()
