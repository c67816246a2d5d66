"""Shared parts of the training scripts: pictures, learning rate, storage."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from domains.text_to_image.shapes.world import Picture, Prompt, sample

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel


def draw(
    rng: np.random.Generator, prompts: Sequence[Prompt], num_pictures: int
) -> tuple[list[Prompt], Tensor]:
    """New pictures of prompts picked at random.

    Returns:
        The prompts and their pictures `[B, 3, 64, 64]` in [0, 1].
    """
    pairs = [sample(rng, prompts) for _ in range(num_pictures)]
    return [prompt for prompt, _ in pairs], pixels_of([picture for _, picture in pairs])


def pixels_of(pictures: Sequence[Picture]) -> Tensor:
    """Pictures as `[B, 3, 64, 64]` in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def warm_up_cosine(
    optimizer: torch.optim.Optimizer, num_steps: int, *, num_warm_up: int = 100
) -> LambdaLR:
    """A learning rate that rises linearly, then falls to zero along half a cosine."""

    def factor(step: int) -> float:
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        done = (step - num_warm_up) / max(1, num_steps - num_warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float = 0.99) -> None:
    """Move a copy of a network towards the network: an exponential moving average of weights."""
    for mean, weight in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def save_half(model: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Write a model's weights in fp16; the model in memory keeps its precision."""
    copy.deepcopy(model).half().save_pretrained(folder)


def arguments(
    description: str, *, out: Path, num_steps: int, batch_size: int
) -> argparse.Namespace:
    """The command line both scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out, help="folder to write to")
    parser.add_argument("--steps", type=int, default=num_steps, help="optimiser updates")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
