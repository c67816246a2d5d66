"""Noise that depends on what is sampled, not on how it is batched or on how many processes run.

Each sample owns a generator seeded from what identifies it (seed, round, condition, candidate).
Noise is drawn on the CPU and moved, as diffusers does for CPU generators, so that a seed means the
same picture on every device, in any chunk, under any number of processes.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Generators", "generators", "paired", "rand_like", "randn_like", "seed_from"]

Generators = Sequence[torch.Generator] | None
"""One generator per row of the batch, or None for torch's global generator."""


def seed_from(*key: int) -> int:
    """Hash integers into a seed in [0, 2^63); nearby keys give unrelated seeds."""
    text = ",".join(str(int(part)) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per seed, in the state `torch.Generator().manual_seed(seed)`."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def paired(noise: Generators, num: int) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """Return two generators per row that draw the same noise, seeded from a row's own.

    Args:
        noise: One generator per row, or None for torch's global one.
        num: Number of rows.
    """
    own = [None] * num if noise is None else list(noise)
    seeds = [int(torch.randint(2**62, (), generator=one)) for one in own]
    return generators(seeds), generators(seeds)


def randn_like(like: Tensor, noise: Generators = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of `like` ([B, ...])."""
    return _draw(torch.randn, torch.randn_like, like, noise)


def rand_like(like: Tensor, noise: Generators = None) -> Tensor:
    """Draw uniform noise in [0, 1) of the shape, dtype and device of `like` ([B, ...])."""
    return _draw(torch.rand, torch.rand_like, like, noise)


def _draw(
    draw: Callable[..., Tensor],
    draw_like: Callable[[Tensor], Tensor],
    like: Tensor,
    noise: Generators,
) -> Tensor:
    if noise is None:
        return draw_like(like)
    if len(noise) != like.shape[0]:
        raise ValueError(f"{len(noise)} generators were given for a batch of {like.shape[0]}")
    drawn = [draw(like.shape[1:], generator=own, dtype=like.dtype) for own in noise]
    return torch.stack(drawn).to(like.device, non_blocking=True)
