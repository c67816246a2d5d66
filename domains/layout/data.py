"""DataModule of layouts; parts of each may be given as its condition."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from domains.layout.samples import EMPTY
from domains.layout.sources import Grammar, Source
from domains.layout.sources.packed import Packed
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.kit.data import Record, Rows, Split
from lit_rlft.kit.sources import SourceData

__all__ = ["LayoutData", "Task", "given"]

Task = Literal["unconditional", "category", "category_size", "completion"]
_TASKS: tuple[Task, ...] = get_args(Task)
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_COMPLETION = (0.1, 0.9)  # share of the elements that are given: at least one, not all of several


class LayoutData(SourceData[Packed]):
    """Layouts and what is given of each: nothing, its classes, sizes too, or whole elements.

    Rows are `{"index", "boxes": [N, 4], "labels": [N], "known_boxes": bool [N, 4], "known_labels":
    bool [N], "task", "classes"}`. Elements lie in an order that follows from what is given: whole
    elements first, by class where the classes are known; otherwise in reading order.

    Args:
        source: The layouts; pages of the page grammar unless given.
        val_source: Layouts of the validation split; None holds out some of `source`.
        test_source: Layouts of the test split; None holds out some of `source`.
        tasks: Share of each task: "unconditional", "category" (the classes are given),
            "category_size" (and widths and heights), "completion" (some elements are given).
            All unconditional unless given.
        num_draws: Times each layout occurs in a training pass, each time with a new condition.
        **rest: Fractions and limits of the splits (`SourceData`) and arguments of the loaders.

    Raises:
        UsageError: A task is unknown or its share negative; or, in `setup`, sources differ in
            classes or slots, or have too few layouts for the splits.
    """

    def __init__(
        self,
        source: Source | None = None,
        *,
        val_source: Source | None = None,
        test_source: Source | None = None,
        tasks: dict[str, float] | None = None,
        num_draws: int = 1,
        **rest: Any,
    ) -> None:
        source = source or Grammar()
        super().__init__(source, val_source=val_source, test_source=test_source, **rest)
        self.source = source
        at_least(1, self, num_draws=num_draws)
        at_least(0, self, tasks=tasks)
        self.shares = _shares(tasks or {"unconditional": 1.0})
        self.num_draws = num_draws

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        packed, chosen = self.chosen(split)
        stream = (self.seed, _SPLITS.index(split))

        def row(i: int) -> Record:
            rng = np.random.default_rng([*stream, i])
            place = chosen[i % len(chosen)]
            task = _TASKS[int(np.searchsorted(self.shares, rng.random(), side="right"))]
            return self._row(packed.boxes[place], packed.labels[place], task, rng)

        return Rows(len(chosen) * (self.num_draws if split == "train" else 1), row)

    def _row(
        self,
        boxes: NDArray[np.float32],
        labels: NDArray[np.int8],
        task: Task,
        rng: np.random.Generator,
    ) -> Record:
        fixed = np.zeros(len(labels), bool)
        if task == "completion":
            fixed = _some(int((labels != EMPTY).sum()), len(labels), rng)
        # Where the classes are given, an order of reading would give away more than they do.
        by_class = task in ("category", "category_size")
        numbers = np.where(labels == EMPTY, len(self.source.classes), labels if by_class else 0)
        order = np.lexsort((numbers, ~fixed))  # stable: equal ones stay in reading order
        ordered = torch.from_numpy(labels[order].astype(np.int64))
        known_boxes, known_labels = given(task, ordered, torch.from_numpy(fixed[order]))
        return {
            "boxes": torch.from_numpy(boxes[order]),
            "labels": ordered,
            "known_boxes": known_boxes,
            "known_labels": known_labels,
            "task": task,
            "classes": self.source.classes,
        }


def given(task: Task, labels: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a task gives of a layout: which box values [N, 4] and which labels [N], bool.

    Args:
        task: The task.
        labels: [N] int64 classes, `EMPTY` in empty slots.
        fixed: [N] bool, the elements that "completion" gives.
    """
    known_boxes = torch.zeros(len(labels), 4, dtype=torch.bool)
    known_labels = torch.zeros(len(labels), dtype=torch.bool)
    if task == "completion":
        known_boxes[fixed], known_labels[fixed] = True, True
    elif task != "unconditional":
        # Empty slots too: how many elements there are follows from their classes.
        known_labels[:] = True
    if task == "category_size":
        known_boxes[labels != EMPTY, 2:] = True
    return known_boxes, known_labels


def _some(num_elements: int, num_slots: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw which elements are given for completion, bool [num_slots]."""
    share = rng.uniform(*_COMPLETION)
    count = min(max(1, round(share * num_elements)), max(num_elements - 1, 1))
    fixed = np.zeros(num_slots, bool)
    fixed[rng.permutation(num_elements)[:count]] = True
    return fixed


def _shares(tasks: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the cumulative shares of `_TASKS` but for the last, [3]."""
    unknown = sorted(set(tasks) - set(_TASKS))
    if unknown:
        raise UsageError(f"data.init_args.tasks names {unknown}; the tasks are {list(_TASKS)}")
    shares = np.array([tasks.get(task, 0.0) for task in _TASKS])
    if (shares < 0).any() or not shares.sum() > 0:
        raise UsageError(
            f"data.init_args.tasks must have shares of 0 or more, not all 0, got {tasks}"
        )
    return np.cumsum(shares / shares.sum())[:-1]
