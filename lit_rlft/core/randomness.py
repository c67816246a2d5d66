"""Noise that depends on what is sampled, not on how it is batched or on how many processes run.

Each sample owns a generator seeded from what identifies it (seed, round, condition, candidate).
Noise is drawn on the CPU and moved, as diffusers does for CPU generators, so that a seed means the
same picture on every device, in any chunk, under any number of processes.

A walk draws the noise of several steps at once (`StepNoise`): a call costs as much as hundreds of
numbers. How many depends on the size of one sample alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Generators",
    "Seeded",
    "StepNoise",
    "generators",
    "next_step",
    "own_rng",
    "paired",
    "rand_like",
    "randn_like",
    "seed_from",
    "step_noise",
]

_MOST_AHEAD = 4096
"""Numbers of a sample that are drawn at once for several steps; a larger state draws each step."""

Generators = Sequence[torch.Generator] | None
"""One generator per row of the batch, or None for torch's global generator."""

Fill = Callable[[Tensor, torch.Generator], object]
"""Draws a tensor's numbers in place."""

Made = Callable[[Tensor], Tensor]
"""Makes of noise [B, num, ...] what `num` steps use, each from its own, so that it runs once."""


class Seeded(Sequence[torch.Generator]):
    """One generator per seed, made once the first of them is asked for: not all losses draw noise.

    Args:
        seeds: One integer per row of the batch.
        key: What the generators are for; the seed of each is `seed_from(seed, *key)`.
    """

    def __init__(self, seeds: Sequence[int], *key: int) -> None:
        self._seeds, self._key = seeds, key

    @cached_property
    def _made(self) -> list[torch.Generator]:
        return generators([seed_from(seed, *self._key) for seed in self._seeds])

    def __getitem__(self, row: Any) -> Any:  # a generator, or several for a slice
        return self._made[row]

    def __iter__(self) -> Iterator[torch.Generator]:
        """Iterate over the generators."""
        return iter(self._made)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._seeds)


class StepNoise(Sequence[torch.Generator]):
    """The generators of a walk, which draw for several of its steps at once.

    Every step makes the same draws: one, or one for each field of the state. The first time, each
    draw is made for as many steps as have 4,096 numbers of a sample in all, or for one.

    Args:
        own: One generator per row of the batch.
        num_steps: Number of the walk's steps.
    """

    def __init__(self, own: Sequence[torch.Generator], num_steps: int) -> None:
        self.own, self._left, self._draw = own, num_steps + 1, 0
        self._ahead: list[list[Tensor]] = []
        """By draw of a step, its noise for the next steps, the last of them first."""

    def __getitem__(self, row: Any) -> Any:  # a generator, or several for a slice
        return self.own[row]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.own)

    def next(self) -> None:
        """Go on to the next step, or to the first."""
        self._left, self._draw = self._left - 1, 0

    def drawn(self, fill: Fill, like: Tensor, made: Made | None = None) -> Tensor:
        """Return the noise of this step's next draw, of the shape, dtype and device of `like`."""
        if self._draw == len(self._ahead):
            self._ahead.append([])
        ahead = self._ahead[self._draw]
        self._draw += 1
        if not ahead:
            num = min(self._left, _MOST_AHEAD // max(like.shape[1:].numel(), 1))
            drawn = _filled(fill, like, self.own, max(num, 1))
            drawn = drawn if made is None else made(drawn)
            ahead.extend(reversed(drawn.unbind(dim=1)))
        return ahead.pop()


def step_noise(noise: Generators, num_steps: int) -> Generators:
    """Return the noise of a walk of so many steps, or of one that a longer walk has begun."""
    if noise is None or isinstance(noise, StepNoise):
        return noise
    return StepNoise(noise, num_steps)


def next_step(noise: Generators) -> Generators:
    """Return the noise of a walk, gone on to its next step, or to the first."""
    if isinstance(noise, StepNoise):
        noise.next()
    return noise


def seed_from(*key: int) -> int:
    """Hash integers into a seed in [0, 2^63); nearby keys give unrelated seeds."""
    text = ",".join([str(int(part)) for part in key])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def own_rng(seed: int | None = None) -> Iterator[None]:
    """Give torch's global generators back afterwards as they were.

    A GPU's generator is among them where the process uses a GPU already. `torch.random.fork_rng`
    alone would begin to use all of them, in runs on the processor and before processes fork too.

    Args:
        seed: Of what is drawn within; None goes on from where the generators are.
    """
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=used):
        if seed is not None:
            torch.manual_seed(seed)
        yield


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


def randn_like(like: Tensor, noise: Generators = None, made: Made | None = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of `like` ([B, ...]).

    Args:
        like: What is drawn for.
        noise: One generator per row, or None for torch's global one.
        made: What becomes of the noise, each step's for itself; a walk's draws are the same in
            every step.
    """
    if noise is None:
        drawn = torch.randn_like(like)
        return drawn if made is None else made(drawn.unsqueeze(1))[:, 0]
    return _drawn(lambda row, own: row.normal_(generator=own), like, noise, made)


def rand_like(like: Tensor, noise: Generators = None, made: Made | None = None) -> Tensor:
    """Draw uniform noise in [0, 1) of the shape, dtype and device of `like`, as `randn_like`."""
    if noise is None:
        drawn = torch.rand_like(like)
        return drawn if made is None else made(drawn.unsqueeze(1))[:, 0]
    return _drawn(lambda row, own: row.uniform_(generator=own), like, noise, made)


def _drawn(fill: Fill, like: Tensor, noise: Sequence[torch.Generator], made: Made | None) -> Tensor:
    if isinstance(noise, StepNoise):
        return noise.drawn(fill, like, made)
    drawn = _filled(fill, like, noise, 1)
    return (drawn if made is None else made(drawn))[:, 0]


def _filled(fill: Fill, like: Tensor, own: Sequence[torch.Generator], num: int) -> Tensor:
    """Draw for `num` steps, [B, num, ...]: one call for each generator."""
    size, *shape = like.shape
    if len(own) != size:
        raise ValueError(f"{len(own)} generators were given for a batch of {size}")
    pinned = like.device.type == "cuda"
    drawn = torch.empty(size, num, *shape, dtype=like.dtype, pin_memory=pinned)
    for row, generator in zip(drawn.unbind(), own, strict=True):
        fill(row, generator)
    return drawn.to(like.device, non_blocking=True)
