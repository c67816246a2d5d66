"""Single layouts, as `predict` writes them: all that a model draws, also pages no data set has."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.layout.samples import EMPTY
from domains.layout.sources.formats import page_of
from domains.layout.sources.packed import Element, Page
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.files import encoding

__all__ = ["read_layout"]


def read_layout(
    sample: Any, folder: Path, classes: Sequence[str], num_slots: int
) -> dict[str, Tensor]:
    """Return one layout's `boxes` [N, 4] and `labels` [N], its elements in the file's order.

    Boxes are centre and size in fractions of the canvas, and may lie outside or have no area.

    Args:
        sample: A .json file, relative to `folder`, or the object that such a file holds.
        folder: Where the file is.
        classes: Names of the labels.
        num_slots: N.

    Raises:
        UsageError: It is no layout, or has unknown classes or too many elements.
    """
    is_file = isinstance(sample, str)
    if is_file:
        path = folder / sample
        text = path.read_text(encoding=encoding(path), errors="replace")
    else:
        text = json.dumps(sample)
    page = page_of(sample if is_file else "the layout", text)
    if isinstance(page, BadEntry):
        raise UsageError(f'{page}; write {{"canvas": [w, h], "elements": [...]}}, as predict does')
    if not all(math.isfinite(size) and size > 0 for size in (page.width, page.height)):
        raise UsageError(f"{page.name} has a canvas of {page.width} x {page.height}; give its size")
    if len(page.elements) > num_slots:
        raise UsageError(
            f"{page.name} has {len(page.elements)} elements, the model {num_slots}; take it out"
        )
    numbers = {name: i for i, name in enumerate(classes)}
    boxes, labels = torch.zeros(num_slots, 4), torch.full((num_slots,), EMPTY)
    for i, element in enumerate(page.elements):
        boxes[i], labels[i] = _box(page, i, element), _number(page, i, element, numbers)
    return {"boxes": boxes, "labels": labels}


def _box(page: Page, i: int, element: Element) -> Tensor:
    width, height = element.width / page.width, element.height / page.height
    x, y = element.left / page.width, element.top / page.height
    box = [x + width / 2, y + height / 2, width, height]
    if not all(map(math.isfinite, box)):
        raise UsageError(f"{page.name}: element {i} has a box that is not finite; take it out")
    return torch.tensor(box)


def _number(page: Page, i: int, element: Element, numbers: Mapping[str, int]) -> int:
    if element.label not in numbers:
        raise UsageError(
            f"{page.name}: element {i} is a {element.label!r}, the model knows {list(numbers)}"
        )
    return numbers[element.label]
