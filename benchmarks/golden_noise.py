"""How much of the reward's variance the initial noise explains, by kind of prompt and over all.

Method: the embedded shapes model without guidance, deterministic sampler, ShapesEval. The same 64
initial noises are walked under 8 prompts of each of the six tasks, at each number of steps. Without
noise on the way x_1 explains all of Var r within a prompt; it is split into what the noise earns
under all prompts (what a prior without the prompt can learn) and what it earns under its own prompt
beside that (what conditioning adds at most), by a two-way analysis of variance, for the prompts of
each task and for all 48. Besides: the share that is linear in x_1, along the maps that the policy
has (4 x 4 of 4 channels, interpolated), of one direction for all prompts and of one for each; and
what the best noise of the 64 gains above their mean, the one that is best for the other prompts
("for all"), and the best of 4 under each prompt.

    python benchmarks/golden_noise.py run --out golden_noise.jsonl --steps 2 8 32
    python benchmarks/golden_noise.py table --out golden_noise.jsonl

One line of JSON per number of steps and seed, with all rewards; what is there is kept.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import print_table
from quiet import quiet_trainer
from torch import Tensor
from torch.nn.functional import interpolate

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import ShapesEval
from domains.text_to_image.shapes.world import TASKS, all_prompts
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.evaluation.noise_share import crossed, golden_gains, linear_shares, noise_shares
from lit_rlft.kit.ratios import error_of_mean
from lit_rlft.runs.lines import append_lines, read_lines

NOISES, PROMPTS = 64, 8


def prompts_of(task: str, seed: int, num: int = PROMPTS) -> list[str]:
    """Return different prompts of a task, as many as it has or `num`."""
    texts = [prompt.text for prompt in all_prompts(task)]
    order = np.random.default_rng([seed, TASKS.index(task)]).permutation(len(texts))
    return [texts[i] for i in order[:num]]


def tuner_of(num_steps: int, pretrained: str = "shapes") -> NoisePPO:
    """Return Noise PPO before training: the reference, its sampler and the reward."""
    pipeline = TextToImagePipeline(pretrained, guidance_scale=1.0)
    tuner = NoisePPO(pipeline, ShapesEval(), sampler=Sampler(num_steps), sampling_batch_size=256)
    tuner.trainer = quiet_trainer()
    tuner.setup("test")
    return tuner


@torch.no_grad()
def measure(tuner: NoisePPO, seed: int, num_prompts: int, num_noises: int) -> dict[str, Any]:
    """Return the tasks of prompts and their rewards under the same noises, [prompts, noises]."""
    start = time.process_time()
    chosen = [(task, text) for task in TASKS for text in prompts_of(task, seed, num_prompts)]
    condition = tuner.pipeline.encode({"prompt": [text for _, text in chosen]})
    seeds = [seed_from(seed, i) for i in range(num_noises)]
    rewards = crossed(tuner.rollouts, tuner.reference_route(), condition, seeds)
    return {
        "tasks": [task for task, _ in chosen],
        "prompts": [text for _, text in chosen],
        "rewards": rewards.squeeze(2).tolist(),
        "processor_seconds": time.process_time() - start,
    }


def run(out: Path, steps: Sequence[int], seeds: Sequence[int]) -> None:
    """Measure what is not in the file yet."""
    known = {(line["steps"], line["seed"]) for line in read_lines(out)}
    for seed in seeds:
        for num_steps in steps:
            if (num_steps, seed) not in known:
                found = measure(tuner_of(num_steps), seed, PROMPTS, NOISES)
                own = {"steps": num_steps, "seed": seed, **found}
                append_lines(out, json.dumps(own) + "\n")
                print(f"{num_steps} steps: {found['processor_seconds']:.0f} s", flush=True)


def along_maps(x_1: Tensor, size: int = 4) -> Tensor:
    """Return the coordinates of noises [n, C, h, w] along interpolated maps, [n, C size^2]."""
    small = torch.eye(size**2, dtype=x_1.dtype).view(-1, 1, size, size)
    large = interpolate(small, x_1.shape[2:], mode="bilinear").flatten(1)
    basis, _ = torch.linalg.qr(large.T)
    return (x_1.flatten(2) @ basis).flatten(1)


def initial_noise(seed: int, num: int) -> Tensor:
    """Return the noises that `measure` walks, [n, 4, 8, 8] of the embedded model."""
    own = generators([seed_from(seed, i) for i in range(num)])
    return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in own])


def best_of(rewards: Tensor, num: int) -> Moments:
    """Return what the best of `num` noises gains on average, over prompts, with its error.

    Of n sorted rewards the i-th (from 0) is the best of binom(i, num - 1) of binom(n, num) draws.
    """
    total = rewards.shape[1]
    weights = [math.comb(i, num - 1) / math.comb(total, num) for i in range(total)]
    best = rewards.sort(dim=1).values @ torch.tensor(weights, dtype=rewards.dtype)
    gains = best - rewards.mean(dim=1)
    return {"mean": float(gains.mean()), "sem": error_of_mean(gains)}


def row(rewards: Tensor, x_1: Tensor) -> list[str]:
    """Return a table's cells for rewards [prompts, noises] of initial noises."""
    cells = rewards.unsqueeze(2)
    shares, linear = noise_shares(cells), linear_shares(cells, along_maps(x_1))
    numbers = [shares["variance"], shares["common"], shares["own"], linear["common"]]
    numbers += [linear["each"], golden_gains(cells)["common"], best_of(rewards, 4)]
    return [
        f"{float(rewards.mean()):.3f}",
        *("{mean:.3f} ± {sem:.3f}".format(**number) for number in numbers),
    ]


def table(out: Path) -> None:
    """Print the shares by steps and task; a task's noises are those of all."""
    rows = []
    for line in read_lines(out):
        rewards = torch.tensor(line["rewards"], dtype=torch.float64)
        x_1 = initial_noise(line["seed"], rewards.shape[1]).double()
        for task in ("all", *TASKS):
            own = [i for i, name in enumerate(line["tasks"]) if task in ("all", name)]
            rows.append([str(line["steps"]), task.replace("_", " "), *row(rewards[own], x_1)])
    columns = ["steps", "prompts", "mean", "Var r", "common", "own", "linear, common"]
    print_table([*columns, "linear, each", "best noise for all", "best of 4"], rows)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("golden_noise.jsonl"))
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.what == "table":
        table(options.out)
    else:
        run(options.out, options.steps, options.seeds)


if __name__ == "__main__":
    main()
