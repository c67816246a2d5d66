"""DataModules of prompts, and of the captioned pictures of the shapes world."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from domains.text_to_image.shapes import world
from domains.text_to_image.sources.prompts import PromptFile, Records, read_prompts
from lit_rlft.core.checks import at_least, one_of, require
from lit_rlft.kit.data import Record, Rows, Split, SplitData
from lit_rlft.kit.sources import SourceData

__all__ = ["PromptData", "ShapesPictures", "ShapesPrompts", "read_prompts"]


class PromptData(SourceData[Records]):
    """Prompts from a file: `.txt`, `.json`, `.jsonl`, `.csv` or `.tsv`.

    Further columns of a record travel with its prompt (GenEval's `tag` and `include`), None where
    a record lacks what another has. Where `source` is split, a prompt that occurs several times
    counts once, so that no split sees another's. A file above 4 MiB is read once: its records are
    kept on disk and mapped into memory, so a million prompts cost a process few bytes each.

    Args:
        source: The file. A `.txt` has one prompt a line; the others have records with `column`.
        column: Key or column of the prompt.
        val_source: File of the validation split; None takes `val_fraction` of `source`.
        test_source: File of the test split; None takes `test_fraction` of `source`.
        val_fraction: Share of `source` held out for validation, where it has no file.
        test_fraction: Share of `source` held out for the test, where it has no file.
        num_val_prompts: Validate on the first so many prompts; None takes all.
        num_test_prompts: Test on the first so many prompts; None takes all.
        cache_dir: Where the prompts of a file above 4 MiB are kept, to be mapped into memory; None
            takes `lit-rlft/prompts` in the user's cache folder.
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
        cache_dir: str | None = None,
        **loading: Any,
    ) -> None:
        at_least(1, self, num_val_prompts=num_val_prompts, num_test_prompts=num_test_prompts)
        whole = val_source is not None and test_source is not None

        def file(path: str | None) -> PromptFile | None:
            return None if path is None else PromptFile(path, column, cache_dir=cache_dir)

        super().__init__(
            PromptFile(source, column, once=not whole, cache_dir=cache_dir),
            val_source=file(val_source),
            test_source=file(test_source),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            num_train=None,
            num_val=num_val_prompts,
            num_test=num_test_prompts,
            **loading,
        )

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        records, places = self.chosen(split)
        return Rows(len(places), lambda i: records[places[i]])


class ShapesPrompts(SplitData):
    """Prompts of the shapes world, the six tasks in equal shares, held-out prompts for evaluation.

    Args:
        num_train_prompts: Prompts in one training epoch; tasks take turns.
        num_val_prompts: Prompts in validation.
        num_test_prompts: Prompts in the test.
        train_tasks: Tasks of the training prompts; one that is named twice has twice the share.
            Validation and test have all six.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.
    """

    def __init__(
        self,
        num_train_prompts: int = 1536,
        num_val_prompts: int = 48,
        num_test_prompts: int = 192,
        train_tasks: Sequence[world.Task] = world.TASKS,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        at_least(1, self, num_train_prompts=num_train_prompts)
        at_least(1, self, num_val_prompts=num_val_prompts, num_test_prompts=num_test_prompts)
        _check_tasks(self, train_tasks)
        self.sizes = {"train": num_train_prompts, "val": num_val_prompts, "test": num_test_prompts}
        self.train_tasks = train_tasks

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        tasks = self.train_tasks if split == "train" else world.TASKS
        texts = _balanced(split, self.sizes[split], self.seed, tasks)
        return Rows(len(texts), lambda i: {"prompt": texts[i]})


class ShapesPictures(SplitData):
    """Captioned pictures of the shapes world, painted on demand: `image` uint8 [3, 64, 64].

    Args:
        num_pictures: Pictures in the training split; each is a function of its number.
        num_val_prompts: Prompts in validation.
        num_test_prompts: Prompts in the test.
        train_tasks: Tasks of the training pictures; one that is named twice is drawn twice as
            often. None draws all six alike; validation and test have all six.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.
    """

    def __init__(
        self,
        num_pictures: int = 32768,
        num_val_prompts: int = 48,
        num_test_prompts: int = 192,
        train_tasks: Sequence[world.Task] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        at_least(1, self, num_pictures=num_pictures)
        at_least(1, self, num_val_prompts=num_val_prompts, num_test_prompts=num_test_prompts)
        if train_tasks is not None:
            _check_tasks(self, train_tasks)
        self.sizes = {"train": num_pictures, "val": num_val_prompts, "test": num_test_prompts}
        self.train_tasks = train_tasks

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        prompts = world.split_prompts(split)
        if split != "train":
            texts = _balanced(split, self.sizes[split], self.seed)
            return Rows(len(texts), lambda i: {"prompt": texts[i]})

        pools = [prompts] if self.train_tasks is None else _by_task(prompts, self.train_tasks)

        def row(i: int) -> Record:
            rng = np.random.default_rng([self.seed, i])
            # One pool asks for no number: the pictures of all tasks stay those of earlier versions.
            pool = pools[rng.integers(len(pools))] if len(pools) > 1 else pools[0]
            prompt, picture = world.sample(rng, pool)
            image = torch.from_numpy(picture).permute(2, 0, 1)
            return {"prompt": prompt.text, "image": image}

        return Rows(self.sizes[split], row)


def _by_task(
    prompts: Sequence[world.Prompt], tasks: Sequence[world.Task]
) -> list[list[world.Prompt]]:
    return [[prompt for prompt in prompts if prompt.task == task] for task in tasks]


def _check_tasks(owner: SplitData, tasks: Sequence[world.Task]) -> None:
    """Raise BadArgument unless there are tasks to train on, and each is known."""
    require(len(tasks) > 0, owner, "train_tasks", f"some of {', '.join(world.TASKS)}")
    for task in tasks:
        one_of(owner, "train_tasks", world.TASKS, task)


def _balanced(
    split: Split, num: int, seed: int, tasks: Sequence[world.Task] = world.TASKS
) -> list[str]:
    """Return `num` prompts of a split, tasks taking turns, each task's prompts cycled shuffled."""
    rng = np.random.default_rng([seed, {"train": 0, "val": 1, "test": 2}[split]])
    prompts = world.split_prompts(split)
    queues: list[list[str]] = []
    for pool in _by_task(prompts, tasks):
        texts = [prompt.text for prompt in pool]
        repeats = -(-num // (len(tasks) * len(texts))) + 1
        queues.append([texts[i] for _ in range(repeats) for i in rng.permutation(len(texts))])
    return [queues[i % len(queues)][i // len(queues)] for i in range(num)]
