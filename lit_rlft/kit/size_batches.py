"""Batches of rows of one size, such as molecules of equally many atoms: no slot is empty."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["Batches", "FixedBatches", "SizeBatches", "training_batches"]


class Batches(Dataset[list[dict[str, Any]]]):
    """A data set whose items are batches: a list of row numbers gives those rows.

    Loaders then take a sampler of lists. Lightning leaves it alone where it is a
    `DistributedSampler`; a batch sampler would be replaced by one of Lightning's own.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Dataset[dict[str, Any]]) -> None:
        self.rows = rows

    def __getitem__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [self.rows[number] for number in numbers]


class SizeBatches(DistributedSampler[Any]):
    """Training batches of one size, pass after pass; each rank gets its share of each batch.

    A resumed run goes on after the last batch that it has trained on, also in the middle of a pass.

    Args:
        sizes: [n] size of each row.
        batch_size: Rows per batch, over all ranks.
        ranks: Number of ranks.
        rank: This one.
        seed: Seed of the order.
        seen: Returns the number of batches trained on since the beginning, or None where no
            trainer counts them and `set_epoch` says which pass it is.
    """

    def __init__(
        self,
        sizes: NDArray[np.int64],
        batch_size: int,
        ranks: int = 1,
        rank: int = 0,
        *,
        seed: int = 0,
        seen: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__(range(len(sizes)), ranks, rank, seed=seed)  # type: ignore[arg-type]
        self.sizes, self.batch_size, self.seen = sizes, batch_size, seen

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return max(1, len(self.sizes) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, seen = self.epoch, self.seen()
        done, first = divmod(epoch * len(self) if seen is None else seen, len(self))
        for batch in [*self._pass(done)[first:], *self._pass(done + 1)[:first]]:
            yield batch[self.rank :: self.num_replicas].tolist()

    def _pass(self, number: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, number])
        return training_batches(self.sizes, self.batch_size, rng)


class FixedBatches(DistributedSampler[Any]):
    """Batches of rows of one size, in order of size, each row once over all ranks.

    Where there are fewer batches than ranks the largest are halved, for each rank needs one.

    Args:
        sizes: [n] size of each row.
        batch_size: Most rows of a batch.
        ranks: Number of ranks.
        rank: This one.
    """

    def __init__(
        self, sizes: NDArray[np.int64], batch_size: int, ranks: int = 1, rank: int = 0
    ) -> None:
        super().__init__(range(len(sizes)), ranks, rank, shuffle=False)  # type: ignore[arg-type]
        batches = [
            rows[i : i + batch_size].tolist()
            for rows in (np.flatnonzero(sizes == size) for size in np.unique(sizes))
            for i in range(0, len(rows), batch_size)
        ]
        self.batches: list[list[int]] = _at_least(ranks, batches)[rank::ranks]

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _at_least(number: int, batches: list[list[int]]) -> list[list[int]]:
    """Return batches in the same order, the largest halved until there are so many, if they can."""
    while len(batches) < number and (size := max(map(len, batches), default=0)) > 1:
        place = [len(batch) for batch in batches].index(size)
        half, whole = -(-size // 2), batches[place]
        batches = [*batches[:place], whole[:half], whole[half:], *batches[place + 1 :]]
    return batches


def training_batches(
    sizes: NDArray[np.int64], batch_size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return a pass of batches, each of rows of one size, in random order.

    There are n // batch_size (at least one), all of `batch_size` rows. Each size gets its share of
    the batches, rounded up or down at random (systematic sampling). Every row is therefore expected
    equally often, although rows of rare sizes are repeated within their batch.

    Args:
        sizes: [n] size of each row.
        batch_size: Rows per batch.
        rng: The randomness.
    """
    members = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    num_batches = max(1, len(sizes) // batch_size)
    shares = np.cumsum([len(rows) for rows in members]) * (num_batches / len(sizes))
    shares[-1] = num_batches  # exactly, without rounding
    ends = np.floor(shares + rng.random()).astype(int)
    batches: list[NDArray[np.int64]] = []
    for rows, count in zip(members, np.diff(ends, prepend=0), strict=True):
        wanted = count * batch_size
        rounds = [rng.permutation(rows) for _ in range(-(-wanted // len(rows)))]
        if rounds:
            batches += np.split(np.concatenate(rounds)[:wanted], count)
    return [batches[i] for i in rng.permutation(len(batches))]
