"""DataModules of prompts, and of the captioned pictures of the shapes world."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from domains.text_to_image.shapes import world
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import Record, Rows, Split, SplitData

__all__ = ["PromptData", "ShapesPictures", "ShapesPrompts", "read_prompts"]


class PromptData(SplitData):
    """Prompts from a file: `.txt`, `.json`, `.jsonl`, `.csv` or `.tsv`.

    Further columns of a record travel with its prompt (GenEval's `tag` and `include`), None where
    a record lacks what another has. Where `source` is split, a prompt that occurs several times
    counts once, so that no split sees another's.

    Args:
        source: The file. A `.txt` has one prompt a line; the others have records with `column`.
        column: Key or column of the prompt.
        val_source: File of the validation split; None takes `val_fraction` of `source`.
        test_source: File of the test split; None takes `test_fraction` of `source`.
        val_fraction: Share of `source` held out for validation, where it has no file.
        test_fraction: Share of `source` held out for the test, where it has no file.
        num_val_prompts: Validate on the first so many prompts; None takes all.
        num_test_prompts: Test on the first so many prompts; None takes all.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: A file is missing, empty, of an unknown type, or lacks the column.
    """

    def __init__(
        self,
        source: str,
        column: str = "prompt",
        *,
        val_source: str | None = None,
        test_source: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_val_prompts: int | None = None,
        num_test_prompts: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.source, self.column = source, column
        self.sources = {"val": val_source, "test": test_source}
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.limits = {"train": None, "val": num_val_prompts, "test": num_test_prompts}
        self._splits: dict[str, list[Record]] = {}

    def setup(self, stage: str) -> None:
        """Read the files and split them."""
        if self._splits:
            return
        rest = read_prompts(Path(self.source), self.column)
        if None in self.sources.values():
            rest = _once(rest)
        order = np.random.default_rng(self.seed).permutation(len(rest))
        rest = [rest[i] for i in order]
        splits: dict[str, list[Record]] = {}
        total = len(rest)
        for split, source in self.sources.items():
            if source is not None:
                splits[split] = read_prompts(Path(source), self.column)
                continue
            size = max(1, round(self.fractions[split] * total))
            splits[split], rest = rest[:size], rest[size:]
        if not rest:
            raise UsageError(
                f"data.init_args.source: {self.source} has {total} prompts, too few for three "
                "splits; give val_source and test_source or a longer file"
            )
        self._splits = {"train": rest, **splits}

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        records = self._splits[split][: self.limits[split]]
        return Rows(len(records), records.__getitem__)


class ShapesPrompts(SplitData):
    """Prompts of the shapes world, the six tasks in equal shares, held-out prompts for evaluation.

    Args:
        num_train_prompts: Prompts in one training epoch; tasks take turns.
        num_val_prompts: Prompts in validation.
        num_test_prompts: Prompts in the test.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.
    """

    def __init__(
        self,
        num_train_prompts: int = 1536,
        num_val_prompts: int = 48,
        num_test_prompts: int = 192,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.sizes = {"train": num_train_prompts, "val": num_val_prompts, "test": num_test_prompts}

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        texts = _balanced(split, self.sizes[split], self.seed)
        return Rows(len(texts), lambda i: {"prompt": texts[i]})


class ShapesPictures(SplitData):
    """Captioned pictures of the shapes world, painted on demand: `image` uint8 [3, 64, 64].

    Args:
        num_pictures: Pictures in the training split; each is a function of its number.
        num_val_prompts: Prompts in validation.
        num_test_prompts: Prompts in the test.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.
    """

    def __init__(
        self,
        num_pictures: int = 32768,
        num_val_prompts: int = 48,
        num_test_prompts: int = 192,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.sizes = {"train": num_pictures, "val": num_val_prompts, "test": num_test_prompts}

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        prompts = world.split_prompts(split)
        if split != "train":
            texts = _balanced(split, self.sizes[split], self.seed)
            return Rows(len(texts), lambda i: {"prompt": texts[i]})

        def row(i: int) -> Record:
            prompt, picture = world.sample(np.random.default_rng([self.seed, i]), prompts)
            image = torch.from_numpy(picture).permute(2, 0, 1)
            return {"prompt": prompt.text, "image": image}

        return Rows(self.sizes[split], row)


def read_prompts(path: Path, column: str = "prompt") -> list[Record]:
    """Return the records of a prompt file, all with the same columns, the prompt under "prompt".

    Raises:
        UsageError: The file is missing, empty, of an unknown type, or lacks the column.
    """
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    readers: dict[str, Callable[[str], Sequence[Any]]] = {
        ".txt": lambda text: text.split("\n"),
        ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
        ".json": json.loads,
        ".csv": lambda text: list(csv.DictReader(io.StringIO(text, newline=""))),
        ".tsv": _tab_separated,
    }
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"data.init_args.source: {path} has an unknown file type; use one of {sorted(readers)}"
        )
    if not path.is_file():
        raise UsageError(f"data.init_args.source: there is no file {path}")
    try:
        records = readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"))
    except (ValueError, csv.Error) as error:
        raise UsageError(f"data.init_args.source: {path} cannot be read ({error})") from error
    if not isinstance(records, list) or not all(isinstance(r, (str, dict)) for r in records):
        raise UsageError(f"data.init_args.source: {path} must hold a list of texts or of records")
    records = [{column: r} if isinstance(r, str) else r for r in records]
    missing = next((i for i, record in enumerate(records) if column not in record), None)
    if missing is not None:
        raise UsageError(
            f"data.init_args.column: record {missing + 1} of {path} has no {column!r}, only "
            f"{sorted(map(str, records[missing]))}; set column to the one that holds the prompt"
        )
    columns = dict.fromkeys(name for record in records for name in record)
    texts = ["" if record[column] is None else str(record[column]).strip() for record in records]
    prompts: list[Record] = [
        {**columns, **record, "prompt": text}
        for record, text in zip(records, texts, strict=True)
        if text
    ]
    if not prompts:
        raise UsageError(f"data.init_args.source: {path} holds no prompts")
    return prompts


def _once(records: list[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["prompt"], record)
    return list(first.values())


def _tab_separated(text: str) -> list[dict[str, str]]:
    # Without quoting, as the format has it: PartiPrompts begin with quotation marks of their own.
    lines = io.StringIO(text, newline="")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _balanced(split: Split, num: int, seed: int) -> list[str]:
    """Return `num` prompts of a split, tasks taking turns, each task's prompts cycled shuffled."""
    rng = np.random.default_rng([seed, {"train": 0, "val": 1, "test": 2}[split]])
    prompts = world.split_prompts(split)
    queues: list[list[str]] = []
    for task in world.TASKS:
        texts = [prompt.text for prompt in prompts if prompt.task == task]
        repeats = -(-num // (len(world.TASKS) * len(texts))) + 1
        queues.append([texts[i] for _ in range(repeats) for i in rng.permutation(len(texts))])
    return [queues[i % len(queues)][i // len(queues)] for i in range(num)]
