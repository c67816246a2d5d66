"""Sources of a domain's data, and the DataModule over three splits of a source."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lit_rlft.core.checks import UsageError, at_least, below_one, reading
from lit_rlft.core.settings import Recorded
from lit_rlft.kit.bad_entries import Report
from lit_rlft.kit.cache import cached_folder, listing, open_arrays, save_arrays, user_cache
from lit_rlft.kit.data import Split, SplitData, hold_out

__all__ = ["CachedSource", "Source", "SourceData", "Splits", "prepare"]

P = TypeVar("P", bound=Sized)
Splits = dict[str, NDArray[np.int64]]
"""Rows of "train", "val" and "test"."""


class Source(Recorded, ABC, Generic[P]):
    """A collection of data, packed into arrays of type P.

    Attributes:
        noun: What its entries are called in messages, e.g. "layouts".
    """

    noun: ClassVar[str] = "entries"

    @property
    def label(self) -> str:
        """What the data are called in messages: the file's path, where there is one."""
        return type(self).__name__

    @abstractmethod
    def load(self) -> P:
        """Return the data.

        Raises:
            UsageError: There are none, or one is bad where none may be.
        """

    @abstractmethod
    def kind(self) -> str:
        """Return what all entries have in common, e.g. "12 slots and the classes ['text']".

        Sources of the same kind can be splits of one DataModule.
        """

    def prepare(self) -> None:
        """Fill the caches that `load` reads; called on one process of each machine."""

    def splits(self, packed: P) -> Splits | None:
        """Return the rows of the data set's standard splits, or None where there are none."""
        return None

    def left_out(self) -> str:
        """Return every entry that cannot be used, a sentence a line; known once it was read."""
        return ""


class CachedSource(Source[P]):
    """A source whose arrays are made once and memory-mapped from then on.

    Attributes:
        packed: The type of the data, made of the arrays of `names`.
        names: Names of the arrays, in the order in which `packed` takes them.

    Args:
        cache: Name of the folder in the user's cache folder.
        cache_dir: Folder of the arrays; None takes `lit-rlft/<cache>` in the user's cache folder.
    """

    packed: ClassVar[type[Any]]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, cache: str, cache_dir: str | None = None) -> None:
        self.cache_dir = user_cache(cache, cache_dir)

    @property
    @abstractmethod
    def label(self) -> str:
        """What the data are called in messages: the file's path, where there is one."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return all that the arrays depend on, as values that JSON can hold.

        Raises:
            UsageError: A file is missing.
        """

    @abstractmethod
    def pack(self) -> tuple[P, Report]:
        """Make the data, and the report on what was left out."""

    def load(self) -> P:
        return self.packed(*open_arrays(self._folder(), self.names))

    def prepare(self) -> None:
        self._folder()

    def digest(self) -> str:
        """Return a hash of all that the arrays depend on."""
        return hashlib.blake2b(json.dumps(self.identity()).encode(), digest_size=8).hexdigest()

    def left_out(self) -> str:
        return listing(self._place())

    def _place(self) -> Path:
        stem = re.sub(r"\W+", "-", Path(self.label).stem)
        return self.cache_dir / f"{stem}-{self.digest()}"

    def _folder(self) -> Path:
        folder = self._place()

        def fill(partial: Path) -> None:
            packed, report = self.pack()
            save_arrays(partial, folder, vars(packed), report)

        return cached_folder(folder, fill)


class SourceData(SplitData, Generic[P]):
    """Three splits of one source, or one source per split; subclasses make the rows.

    Args:
        source: The data.
        val_source: Data of the validation split; None holds out some of `source`.
        test_source: Data of the test split; None holds out some of `source`.
        val_fraction: Share of `source` held out for validation, where it has no source.
        test_fraction: Share of `source` held out for the test, where it has no source.
        num_train: Train on the first so many rows; None takes all.
        num_val: Validate on the first so many rows; None takes all.
        num_test: Test on the first so many rows; None takes all.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, sources differ in kind, or have too little for the splits.
    """

    def __init__(
        self,
        source: Source[P],
        *,
        val_source: Source[P] | None = None,
        test_source: Source[P] | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        below_one(self, val_fraction=val_fraction, test_fraction=test_fraction)
        at_least(1, self, num_train=num_train, num_val=num_val, num_test=num_test)
        self.own: Mapping[str, Source[P] | None] = {"val": val_source, "test": test_source}
        self.origin = source
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.limits = {"train": num_train, "val": num_val, "test": num_test}
        self._splits: dict[str, tuple[P, NDArray[np.int64]]] = {}

    def prepare_data(self) -> None:
        """Fill the caches of the sources, on one process of each machine."""
        prepare(self, "source", self.origin)
        for split, source in self.own.items():
            if source is not None:
                prepare(self, f"{split}_source", source)

    def setup(self, stage: str) -> None:
        """Load the data and split them."""
        if self._splits:
            return
        with reading(self, "source"):
            packed = self.origin.load()
        shares = {split: self.fractions[split] for split, own in self.own.items() if own is None}
        chosen = self.origin.splits(packed) or hold_out(len(packed), shares, self.seed)
        splits = {split: (packed, rows) for split, rows in chosen.items()}
        for split, source in self.own.items():
            if source is not None:
                self._check_kinds(source.kind(), self.origin.kind(), split)
                with reading(self, f"{split}_source"):
                    data = source.load()
                splits[split] = (data, np.arange(len(data)))
        if any(not len(rows) for _, rows in splits.values()):
            noun = self.origin.noun
            raise UsageError(
                f"data.init_args.source: {self.origin.label} has {len(packed)} {noun}, too few for "
                f"three splits; give val_source and test_source or more {noun}"
            )
        self._splits = splits

    def left_out(self) -> str:
        """Return every entry of the sources that was left out, a sentence a line."""
        lists: list[str] = []
        for source in filter(None, (self.origin, *self.own.values())):
            # A file that is missing is another error, and none of this list.
            with suppress(UsageError):
                lists.append(source.left_out())
        return "".join(lists)

    def chosen(self, split: Split) -> tuple[P, NDArray[np.int64]]:
        """Return the data of a split's rows, and the places of the rows in them."""
        packed, rows = self._splits[split]
        return packed, rows[: self.limits[split]]

    def _check_kinds(self, own: str, other: str, split: str) -> None:
        if own != other:
            raise UsageError(
                f"data.init_args.{split}_source has {own}, but source has {other}; give both the "
                "same"
            )


def prepare(owner: object, argument: str, source: Source[Any]) -> None:
    """Fill a source's caches.

    Args:
        owner: Whose source it is.
        argument: Its name among the owner's settings.
        source: The data.

    Raises:
        BadArgument: They cannot be read.
    """
    with reading(owner, argument):
        source.prepare()
