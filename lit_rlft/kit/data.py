"""Loaders over three splits, shared out among ranks: the base of the domains' DataModules."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_rlft.core.checks import BadArgument, UsageError, at_least
from lit_rlft.core.settings import Recorded

__all__ = ["Record", "Rows", "Split", "SplitData", "batches_seen", "collate", "hold_out"]

_AT_A_TIME = 4096
"""Numbers of rows that are taken out of a pass together."""

Split = Literal["train", "val", "test"]
Record = Mapping[str, Any]
"""One row of a data set: columns by name, with the same names in every row."""


class Rows(Dataset[dict[str, Any]]):
    """A data set whose row i is `row(i)`, made on demand, with its number under "index".

    Seeds, files and pairs go by that number: a column of the same name gives way to it.

    Args:
        length: Number of rows.
        row: Returns the columns of a row.
    """

    def __init__(self, length: int, row: Callable[[int], Record]) -> None:
        self.length, self.row = length, row

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: Any = self.row(i)
        if not isinstance(row, Mapping):
            raise UsageError(
                f"row {i} of the data is a {type(row).__name__}; Rows needs a function that "
                'returns a dict of columns, such as {"prompt": "a red ring"}'
            )
        return {**row, "index": i}


class _TrainOrder(DistributedSampler[Any]):
    """Shuffled passes over this rank's share, one after the other, from any batch on.

    Row j of a rank's batch is row rank + ranks * j of the whole batch: what the ranks see together
    does not depend on their number.

    A resumed run goes on after the last batch that it has trained on, also in the middle of a pass.
    Lightning alone would not: it restarts its loaders, and an epoch that a limit on steps cut short
    counts as a whole one.

    Args:
        rows: The training data.
        ranks: Number of ranks.
        rank: This one.
        seed: Seed of the order.
        batch_size: Rows per batch on this rank.
        seen: Returns the number of batches trained on since the beginning, or None where no
            trainer counts them and `set_epoch` says which pass it is.
    """

    def __init__(
        self,
        rows: Dataset[dict[str, Any]],
        ranks: int,
        rank: int,
        *,
        seed: int,
        batch_size: int,
        seen: Callable[[], int | None],
    ) -> None:
        super().__init__(rows, ranks, rank, shuffle=True, seed=seed)
        self.batch_size, self.seen = batch_size, seen

    def __len__(self) -> int:
        """Return the number of rows of a pass."""
        return min(self.num_samples, self._num_batches * self.batch_size)

    @property
    def _num_batches(self) -> int:
        # Of all ranks: a rank's padded share may have room for one that the data do not fill.
        num_rows: int = len(self.dataset)  # type: ignore[arg-type]
        return max(1, num_rows // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.epoch, self.seen()
        num_batches = self._num_batches
        done, first = divmod(epoch * num_batches if seen is None else seen, num_batches)
        cut, size = first * self.batch_size, num_batches * self.batch_size
        order = torch.cat([self._pass(done)[cut:size], self._pass(done + 1)[:cut]])
        for start in range(0, len(order), _AT_A_TIME):
            yield from order[start : start + _AT_A_TIME].tolist()

    def _pass(self, number: int) -> Tensor:
        """Return this rank's rows of a pass, as `DistributedSampler` has them, int64."""
        generator = torch.Generator().manual_seed(self.seed + number)
        num_rows: int = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(num_rows, generator=generator)
        padded = order.repeat(-(-self.total_size // max(num_rows, 1)))[: self.total_size]
        return padded[self.rank :: self.num_replicas]


class SplitData(Recorded, LightningDataModule, ABC):
    """Loaders over three splits; every rank sees its share, in an order fixed by the seed.

    Args:
        batch_size: Conditions per training batch, over all ranks: those of one round.
        eval_batch_size: Conditions per evaluation batch on each rank.
        seed: Seed of the order in which training data are seen, of rows that are drawn, and of the
            choice of rows to hold out: a test with another seed than the fit's tests on others.
        num_workers: Worker processes of each loader; on Linux alone.
    """

    def __init__(
        self, batch_size: int = 32, eval_batch_size: int = 16, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, self, seed=seed, num_workers=num_workers)
        if num_workers and sys.platform != "linux":
            problem = f"must be 0 on this system, whose processes start empty, got {num_workers}"
            raise BadArgument(self, "num_workers", problem)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers

    @abstractmethod
    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        """Return the data of a split."""

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled batches; an incomplete last one is dropped.

        Raises:
            UsageError: `batch_size`, or the number of rows where that is less, is not divisible by
                the number of processes; or the validation of a fit has fewer rows than those.
        """
        ranks, rank = self._place()
        self.check_batch_size(ranks)
        rows = self._dataset("train")
        size, num_rows = self.batch_size // ranks, len(rows)  # type: ignore[arg-type]
        if num_rows < self.batch_size and num_rows % ranks:
            even = num_rows // ranks * ranks
            remedy = f"data.init_args.batch_size to {even}" if even else "trainer.devices to 1"
            raise UsageError(
                f"the training data have {num_rows} rows, fewer than data.init_args.batch_size "
                f"({self.batch_size}), which {ranks} processes cannot share evenly; set {remedy}"
            )
        self._check_validation(ranks)
        order = _TrainOrder(rows, ranks, rank, seed=self.seed, batch_size=size, seen=self._seen)
        return self._loader(rows, size, order, drop_last=True)

    def check_batch_size(self, num_processes: int) -> None:
        """Raise UsageError where `batch_size` is not known or cannot be shared out evenly."""
        self._check_loading()
        if self.batch_size % num_processes:
            raise UsageError(
                f"data.init_args.batch_size ({self.batch_size}) is not divisible by the "
                f"{num_processes} processes; make it a multiple"
            )

    def _check_loading(self) -> None:
        """Raise UsageError where a constructor of its own leaves out the loaders' settings."""
        if "batch_size" not in vars(self):
            name = type(self).__name__
            raise UsageError(f"{name}.__init__ has to call super().__init__(**loading)")

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the validation data in order, each row once over all ranks."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the test data in order, each row once over all ranks."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the conditions of the test data."""
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader[dict[str, Any]]:
        self._check_loading()
        rows = self._dataset(split)
        ranks, rank = self._place()
        self._check_rows(split, rows, ranks)
        order = UnrepeatedDistributedSampler(rows, ranks, rank, shuffle=False)
        return self._loader(rows, self.eval_batch_size, order, drop_last=False)

    def _dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        rows = self.rows(split)
        if not hasattr(rows, "__len__"):
            raise UsageError(
                f"{type(self).__name__}.rows({split!r}) returned a {type(rows).__name__}; it "
                "returns a Dataset with a length, such as Rows(length, row)"
            )
        return rows

    def _check_validation(self, ranks: int) -> None:
        """Raise UsageError where a fit comes to a validation that has too few rows.

        Its own loader would tell it after an epoch.
        """
        if self._validates():
            self._check_rows("val", self._dataset("val"), ranks)

    def _validates(self) -> bool:
        """Return whether a fit comes to a validation."""
        if not getattr(self.trainer, "enable_validation", False):
            return False
        assert self.trainer is not None
        every, epochs = self.trainer.check_val_every_n_epoch, self.trainer.max_epochs
        return every is None or epochs is None or epochs < 0 or every <= epochs

    def _check_rows(self, split: Split, rows: Dataset[dict[str, Any]], ranks: int) -> None:
        num_rows = len(rows)  # type: ignore[arg-type]
        if not num_rows:
            raise UsageError(f"the {split} data have no rows; give them some")
        if num_rows < ranks:
            raise UsageError(
                f"the {split} data have {num_rows} rows, too few for {ranks} processes; give them "
                f"more rows, or set trainer.devices to {num_rows}"
            )

    def _loader(
        self,
        rows: Dataset[dict[str, Any]],
        batch_size: int,
        sampler: DistributedSampler[Any],
        *,
        drop_last: bool,
    ) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            dataset=rows,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last and len(sampler) >= batch_size,
            collate_fn=collate,
            **self.workers,
        )

    @property
    def workers(self) -> dict[str, Any]:
        """Arguments of a loader for its processes: forked, since rows may be closures."""
        context = "fork" if self.num_workers else None
        return {"num_workers": self.num_workers, "multiprocessing_context": context}

    def _seen(self) -> int | None:
        return None if self.trainer is None else batches_seen(self.trainer)

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank


def batches_seen(trainer: Trainer) -> int:
    """Return how many batches a trainer's fit has trained on, also before it was resumed."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)  # type: ignore[attr-defined]


def hold_out(total: int, shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Split rows at random: each name gets its share, at least one row, and "train" the rest.

    Args:
        total: Number of rows.
        shares: Share of all rows by name, taken in this order.
        seed: Seed of the order of the rows.
    """
    rest = np.random.default_rng(seed).permutation(total)
    splits = {}
    for split, share in shares.items():
        size = max(1, round(share * total))
        splits[split], rest = rest[:size], rest[size:]
    return {"train": rest, **splits}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return columns: tensors stacked, `index` int64 [B], everything else a list.

    Raises:
        UsageError: A row is no dict, has other columns than the first one, or lacks its number.
    """
    for place, row in enumerate(rows):
        _check_row(row, rows[0], place)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
        for name, values in columns.items()
    } | {"index": torch.tensor(columns["index"])}


def _check_row(row: Any, first: Any, place: int) -> None:
    if not isinstance(row, Mapping) or "index" not in row:
        given = f"has the columns {sorted(row)}" if isinstance(row, Mapping) else "is none"
        raise UsageError(
            'a row of the data is a dict of columns with its number under "index", as '
            f"Rows(length, row) makes them; row {place} of a batch {given}"
        )
    if differ := sorted(first.keys() ^ row.keys()):
        raise UsageError(
            f"of rows {int(first['index'])} and {int(row['index'])} of the data one alone has "
            f"{' and '.join(map(repr, differ))}; give every row the same columns"
        )
