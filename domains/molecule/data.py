"""DataModules: molecules to pretrain on, and numbers of atoms as conditions of generation."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from domains.molecule.sources import Enumerated, Source
from domains.molecule.sources.packed import Packed
from lit_rlft.core.checks import UsageError, at_least, one_of, reading
from lit_rlft.kit.data import Record, Rows, Split, SplitData, collate
from lit_rlft.kit.size_batches import Batches, FixedBatches, SizeBatches
from lit_rlft.kit.sources import SourceData

__all__ = ["QM9_COUNTS", "QM9_HEAVY_COUNTS", "AtomCounts", "MoleculeData", "histogram"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")

QM9_COUNTS: dict[int, int] = {
    **{3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060},
    **{14: 5136, 15: 7796, 16: 10644, 17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970},
    **{22: 3393, 23: 4848, 24: 539, 25: 1506, 26: 48, 27: 266, 29: 25},
}
"""Molecules of QM9's training split by number of atoms, as published with EDM."""

QM9_HEAVY_COUNTS: dict[int, int] = dict(
    enumerate((2, 5, 7, 25, 91, 475, 2404, 13625, 83366), start=1)
)
"""The same by number of heavy atoms."""

_PUBLISHED: dict[str, dict[int, int]] = {"qm9": QM9_COUNTS, "qm9_heavy": QM9_HEAVY_COUNTS}


class MoleculeData(SourceData[Packed]):
    """Molecules, in batches of one size.

    Rows are `{"index", "num_atoms": int64 [], "positions": [N, 3] in Angstrom around their mean,
    "types": int64 [N], "elements"}`, N the most atoms of the source, empty slots last.

    Args:
        source: The molecules; the enumerated ones unless given.
        val_source: Molecules of the validation split; None holds out some of `source`.
        test_source: Molecules of the test split; None holds out some of `source`.
        bucketed: Whether the molecules of a training batch have equally many atoms.
        **rest: Fractions (where `source` has no standard splits) and limits of the splits
            (`SourceData`) and arguments of the loaders.

    Raises:
        UsageError: In `setup`: sources differ in elements or most atoms, or have too few molecules
            for the splits.
    """

    def __init__(
        self,
        source: Source | None = None,
        *,
        val_source: Source | None = None,
        test_source: Source | None = None,
        bucketed: bool = True,
        **rest: Any,
    ) -> None:
        source = source or Enumerated()
        super().__init__(source, val_source=val_source, test_source=test_source, **rest)
        self.source = source
        self.bucketed = bucketed

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        packed, chosen = self.chosen(split)

        def row(i: int) -> Record:
            types = torch.from_numpy(packed.types[chosen[i]].astype(np.int64))
            return {
                "num_atoms": (types >= 0).sum(),
                "positions": torch.from_numpy(np.array(packed.positions[chosen[i]])),
                "types": types,
                "elements": self.source.elements,
            }

        return Rows(len(chosen), row)

    def sizes(self, split: Split) -> NDArray[np.int64]:
        """Return the number of atoms of each row."""
        packed, chosen = self.chosen(split)
        return packed.num_atoms[chosen]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled batches of one size each, all of `batch_size` rows.

        Raises:
            UsageError: `batch_size` is not divisible by the number of processes, or the validation
                of a fit has fewer rows than those.
        """
        if not self.bucketed:
            return super().train_dataloader()
        ranks, rank = self._place()
        self.check_batch_size(ranks)
        self._check_validation(ranks)
        order = SizeBatches(
            self.sizes("train"), self.batch_size, ranks, rank, seed=self.seed, seen=self._seen
        )
        return self._batched("train", order)

    def _evaluation(self, split: Split) -> DataLoader[dict[str, Any]]:
        ranks, rank = self._place()
        self._check_rows(split, self.rows(split), ranks)
        order = FixedBatches(self.sizes(split), self.eval_batch_size, ranks, rank)
        return self._batched(split, order)

    def _batched(self, split: Split, order: DistributedSampler[Any]) -> DataLoader[Any]:
        return DataLoader(
            Batches(self.rows(split)),
            batch_size=None,
            sampler=order,
            collate_fn=collate,
            **self.workers,
        )


class AtomCounts(SplitData):
    """Numbers of atoms, drawn from a histogram: conditions of generation.

    Rows are `{"index", "num_atoms": int64 [], "most_atoms": int64 []}`, the last being the largest
    number of the histogram; row i is a function of `seed`, the split and i.

    Args:
        counts: Number of molecules, or share, by number of atoms; "qm9" and "qm9_heavy" are QM9's
            training split with and without hydrogens; None counts those of `source`.
        source: Molecules to count; the enumerated ones unless given.
        num_train: Conditions of a training pass.
        num_val: Conditions of the validation.
        num_test: Conditions of the test.
        max_atoms: Leave out larger numbers, beyond what the model has slots for.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: The histogram is empty or has a negative share or number of atoms, its name is
            unknown, or a source is given beside it.
    """

    def __init__(
        self,
        counts: dict[int, float] | Literal["qm9", "qm9_heavy"] | None = None,
        *,
        source: Source | None = None,
        num_train: int = 4096,
        num_val: int = 64,
        num_test: int = 256,
        max_atoms: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if counts is not None and source is not None:
            raise UsageError(
                "data.init_args: counts and source exclude each other; leave one of them out"
            )
        words = "numbers of molecules by numbers of atoms"
        one_of(self, "counts", sorted(_PUBLISHED), counts, others=words)
        at_least(1, self, num_train=num_train, num_val=num_val, num_test=num_test)
        at_least(1, self, max_atoms=max_atoms)
        at_least(0, self, counts=counts)
        self.counts, self.source, self.max_atoms = counts, source, max_atoms
        self.limits = {"train": num_train, "val": num_val, "test": num_test}
        self._histogram: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None

    def setup(self, stage: str) -> None:
        """Count atoms where no histogram is given."""
        if self._histogram is not None:
            return
        if self.counts is None:
            source = self.source or Enumerated()
            with reading(self, "source"):
                counts: Mapping[int, float] = histogram(source.load())
        else:
            counts = _PUBLISHED[self.counts] if isinstance(self.counts, str) else self.counts
        self._histogram = _cumulative(counts, self.max_atoms)

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        assert self._histogram is not None
        sizes, shares = self._histogram
        stream = (self.seed, _SPLITS.index(split))
        most = int(sizes.max())  # in every row, so that no run stops midway at a rare one

        def row(i: int) -> Record:
            drawn = np.random.default_rng([*stream, i]).random()
            place = int(np.searchsorted(shares, drawn, side="right"))
            return {"num_atoms": torch.tensor(int(sizes[place])), "most_atoms": torch.tensor(most)}

        return Rows(self.limits[split], row)


def histogram(packed: Packed) -> dict[int, int]:
    """Return how many molecules have how many atoms."""
    sizes, counts = np.unique(packed.num_atoms, return_counts=True)
    return dict(zip(sizes.tolist(), counts.tolist(), strict=True))


def _cumulative(
    counts: Mapping[int, float], max_atoms: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return numbers of atoms and their cumulative shares but for the last."""
    kept = {n: share for n, share in sorted(counts.items()) if max_atoms is None or n <= max_atoms}
    kept = {n: share for n, share in kept.items() if share != 0}
    shares = np.array([*kept.values()], np.float64)
    if not kept or min(kept) < 1 or (shares < 0).any() or not 0 < shares.sum() < np.inf:
        raise UsageError(
            "data.init_args.counts needs shares of 0 or more, not all 0, by numbers of atoms of at "
            f"least 1{'' if max_atoms is None else f' and at most {max_atoms}'}, got {dict(counts)}"
        )
    return np.array([*kept]), np.cumsum(shares / shares.sum())[:-1]
