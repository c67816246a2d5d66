"""Conditions of layouts, read back from the records that runs write of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.layout.samples import EMPTY
from lit_rlft.core.checks import UsageError

__all__ = ["as_given", "condition_row"]

_TASKS = ("unconditional", "category", "category_size", "completion")
_BY_CLASS = ("category", "category_size")
_TOLERANCE = 2e-3
"""Of the canvas, by which a given value may differ: records have four digits."""
_FORM = (
    '{"task": "category", "given": [{"label": "text", "centre_and_size": [null, null, 0.5, 0.1]}]}'
)


def condition_row(
    entry: Mapping[str, Any], classes: Sequence[str], num_slots: int
) -> dict[str, Any]:
    """Return a condition as `LayoutData` has it: given elements in the first slots, 0 elsewhere.

    Args:
        entry: Its record, `{"task": ..., "given": [...]}`; nothing is given where it is empty.
        classes: Names of the labels.
        num_slots: N.

    Raises:
        UsageError: The record is no condition of a layout.
    """
    task, given = entry.get("task", "unconditional"), entry.get("given", [])
    if task not in _TASKS or not isinstance(given, list) or len(given) > num_slots:
        raise UsageError(f"the condition is none of a layout of {num_slots} slots; write {_FORM}")
    boxes, known_boxes = torch.zeros(num_slots, 4), torch.zeros(num_slots, 4, dtype=torch.bool)
    labels, known_labels = torch.full((num_slots,), EMPTY), torch.zeros(num_slots, dtype=torch.bool)
    known_labels[:] = task in _BY_CLASS  # of empty slots, too
    for i, element in enumerate(given):
        label, box = _element(element)
        if label not in classes:
            raise UsageError(f"the condition gives a {label!r}, the model knows {list(classes)}")
        labels[i], known_labels[i] = list(classes).index(label), True
        known_boxes[i] = torch.tensor([value is not None for value in box])
        boxes[i] = torch.tensor([value or 0.0 for value in box])
    known = {"known_boxes": known_boxes, "known_labels": known_labels}
    return {"boxes": boxes, "labels": labels, **known, "task": task, "classes": tuple(classes)}


def as_given(own: Mapping[str, Tensor], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layout under a condition; what is given has exactly the condition's values.

    Args:
        own: `boxes` [N, 4] and `labels` [N] of the layout.
        row: The condition (`condition_row`).

    Raises:
        UsageError: The layout's first elements are not those that are given.
    """
    known_boxes, known_labels = row["known_boxes"], row["known_labels"]
    other = ((own["boxes"] - row["boxes"]).abs() > _TOLERANCE) & known_boxes
    if (other.any(dim=1) | ((own["labels"] != row["labels"]) & known_labels)).any():
        raise UsageError(
            "the layout does not have what its condition gives, in its first elements and in that "
            "order; write the condition that it was drawn under"
        )
    boxes = row["boxes"].where(known_boxes, own["boxes"])
    return {**row, "boxes": boxes, "labels": own["labels"]}


def _element(element: Any) -> tuple[str, list[float | None]]:
    try:
        label, box = element["label"], element["centre_and_size"]
        whole = [None if value is None else float(value) for value in box]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the condition's given element is none; write {_FORM}") from error
    if len(whole) != 4:
        raise UsageError(f"the condition gives a box of {len(whole)} numbers; write {_FORM}")
    return str(label), whole
