"""The domain's samples: B layouts with N slots for elements each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.samples import Samples, check_samples

__all__ = ["EMPTY", "Layouts", "check_layouts"]

EMPTY = -1
"""Label of a slot without an element."""


@dataclass(frozen=True)
class Layouts(Samples):
    """B layouts; the page is the unit square, y points down.

    Attributes:
        boxes: [B, N, 4] centre x, centre y, width, height; anything where the slot is empty.
        labels: [B, N] int64, numbers in `classes`, or `EMPTY`.
        presence: [B, N] in [0, 1], how much of an element a slot holds, with gradient where the
            model's decision is soft; above or below 1/2 the same as `labels`, not always exactly.
        classes: The names of the labels.
    """

    noun: ClassVar[str] = "layouts"

    boxes: Tensor
    labels: Tensor
    presence: Tensor
    classes: tuple[str, ...]

    @classmethod
    def of(cls, boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> "Layouts":
        """Return layouts whose slots are either full or empty."""
        return cls(boxes, labels, (labels != EMPTY).to(boxes.dtype), tuple(classes))

    def __len__(self) -> int:
        """Return B."""
        return self.labels.shape[0]

    @property
    def valid(self) -> Tensor:
        """Which slots hold an element, bool [B, N]."""
        return self.labels != EMPTY

    @property
    def num_elements(self) -> Tensor:
        """Number of elements of each layout, int64 [B]."""
        return self.valid.sum(dim=1)

    @property
    def finite(self) -> Tensor:
        """Whether the boxes of all elements are finite, bool [B]: a page can be drawn then."""
        return (self.boxes.isfinite().all(dim=-1) | ~self.valid).all(dim=1)

    @property
    def edges(self) -> Tensor:
        """Left, top, right, bottom of each box, [B, N, 4]."""
        centre, half = self.boxes[..., :2], self.boxes[..., 2:] / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    def detach(self) -> "Layouts":
        """Return the same layouts without a graph, every slot full or empty."""
        return Layouts.of(self.boxes.detach(), self.labels, self.classes)


def check_layouts(samples: Any, condition: Condition) -> Layouts:
    """Return samples that are layouts, as they are.

    Raises:
        UsageError: They are something else, or not one per condition.
    """
    return check_samples(samples, condition, Layouts)
