"""The DataModule of preference files: pairs of any domain, read by its pipeline."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lit_rlft.core.checks import UsageError, below_one
from lit_rlft.core.pipeline import PAIR, Pipeline
from lit_rlft.kit.data import Record, Rows, Split, SplitData
from lit_rlft.kit.preferences import Pair, check_lines, read_preferences

__all__ = ["PreferencePairs", "held_out"]


class PreferencePairs(SplitData):
    """Pairs of a preferred and a rejected sample from a file (`lit_rlft.kit.preferences`).

    Rows have the columns of the pair's condition, as the domain's own data have them, and the pair
    under "pair". So Diffusion-DPO learns from the pairs, and `validate` and `test` draw under the
    conditions of those held out. All lines and samples are read before training starts.

    Args:
        file: The preference file.
        val_file: Preference file of validation and test; None holds out some of `file`. Pairs that
            share a sample stay together.
        val_fraction: Share of `file` that is held out, where there is no `val_file`.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`: a file is missing or has no pairs; or lines are bad, the sentence
            has their numbers, keys and what to do.
    """

    def __init__(
        self,
        file: str,
        *,
        val_file: str | None = None,
        val_fraction: float = 0.1,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        below_one(self, val_fraction=val_fraction)
        self.file, self.val_file, self.val_fraction = file, val_file, val_fraction
        self._rows: dict[Split, Sequence[Record]] = {}
        self._read = False

    def setup(self, stage: str) -> None:
        """Read the files; before a fit also each sample, once."""
        fits = stage == "fit"
        if self._rows and (self._read or not fits):
            return
        pipeline, parts = self._pipeline(), self._split()
        by_file: dict[str, list[Pair]] = defaultdict(list)
        by_file[self.file] += parts["train"]
        by_file[self.val_file or self.file] += parts["val"]
        for file, pairs in by_file.items():
            check_pairs(Path(file), pairs, pipeline, samples=fits)
        for split, pairs in parts.items():
            rows = [{**pipeline.condition_row(pair.condition), PAIR: pair} for pair in pairs]
            self._rows[split] = _even(rows)
        self._rows["test"], self._read = self._rows["val"], fits

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        rows = self._rows[split]
        return Rows(len(rows), lambda i: rows[i])

    def _split(self) -> dict[Split, list[Pair]]:
        pairs = read_preferences(Path(self.file))
        if self.val_file is not None:
            return {"train": pairs, "val": read_preferences(Path(self.val_file))}
        out = held_out(pairs, self.val_fraction, self.seed)
        if len(out) in (0, len(pairs)):
            raise UsageError(
                f"{self.file} has {len(pairs)} pairs, of which {len(out)} would be held out; "
                "change data.init_args.val_fraction, or give data.init_args.val_file"
            )
        return {
            "train": [pair for i, pair in enumerate(pairs) if i not in out],
            "val": [pair for i, pair in enumerate(pairs) if i in out],
        }

    def _pipeline(self) -> Pipeline:
        pipeline = getattr(getattr(self.trainer, "lightning_module", None), "pipeline", None)
        if not isinstance(pipeline, Pipeline):
            raise UsageError(
                "PreferencePairs reads samples with the pipeline of the model; give it to a "
                "trainer together with the model, trainer.fit(model, data)"
            )
        return pipeline


def check_pairs(path: Path, pairs: Sequence[Pair], pipeline: Pipeline, *, samples: bool) -> None:
    """Read the conditions of all pairs of a file, and their samples where asked for.

    Raises:
        UsageError: Some cannot be read; the sentence has the first few lines, keys and remedies.
    """
    faults: list[str] = []
    ordered = sorted(pairs, key=lambda pair: pair.line)
    for pair in tqdm(ordered, f"Reading {path.name}", leave=False, delay=2):
        with _noting(faults, f"line {pair.line}: condition"):
            pipeline.condition_row(pair.condition)
            for key in ("chosen", "rejected") if samples else ():
                with _noting(faults, f"line {pair.line}: {key}"):
                    pipeline.read_sample(getattr(pair, key), pair.condition, Path(pair.folder))
    check_lines(path, faults)


@contextmanager
def _noting(faults: list[str], place: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        faults.append(f"{place}: {error}")


def held_out(pairs: Sequence[Pair], share: float, seed: int) -> set[int]:
    """Return the numbers of pairs to hold out: about a share of all, whole groups at random.

    Pairs that share a sample are a group, so that no sample is seen on both sides.

    Args:
        pairs: All pairs.
        share: In [0, 1).
        seed: Seed of the choice.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(_groups(pairs)):
        members[group].append(i)
    groups = list(members.values())
    chosen: set[int] = set()
    for place in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if len(chosen) >= share * len(pairs):
            break
        chosen.update(groups[place])
    return chosen


def _groups(pairs: Sequence[Pair]) -> list[int]:
    """Return each pair's group, named by the first pair in it."""
    parents = list(range(len(pairs)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    first: dict[str, int] = {}
    for i, pair in enumerate(pairs):
        for sample in (pair.chosen, pair.rejected):
            own, other = root(i), root(first.setdefault(json.dumps(sample, sort_keys=True), i))
            parents[max(own, other)] = min(own, other)
    return [root(i) for i in range(len(pairs))]


def _even(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return rows of the same columns, None where one lacks what another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]
