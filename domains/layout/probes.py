"""Pages that have nothing in common: any reward that reads them differs."""

from collections.abc import Sequence

import torch

from domains.layout.samples import EMPTY, Layouts

__all__ = ["probe_pages"]

_PAGES = (
    # A column of lines, all flush and as far apart.
    [(0.5, 0.1 + 0.12 * i, 0.8, 0.08) for i in range(6)],
    # Boxes on top of each other, no edge in line with another's.
    [(0.3 + 0.07 * i, 0.32 + 0.05 * i, 0.3 + 0.03 * i, 0.2 + 0.041 * i) for i in range(5)],
    # Two small ones far apart, one of them half off the page.
    [(0.2, 0.13, 0.07, 0.05), (1.0, 0.9, 0.11, 0.023)],
    # Three large ones side by side.
    [(0.26, 0.27, 0.4, 0.42), (0.75, 0.24, 0.38, 0.4), (0.27, 0.76, 0.41, 0.38)],
)
"""Centre x, centre y, width and height of each element."""


def probe_pages(classes: Sequence[str], num_slots: int) -> Layouts | None:
    """Return four layouts, the same ones in every run; None for a model of single elements.

    Args:
        classes: The model's, which take turns.
        num_slots: The most elements that it has; pages that have more lose their last ones.
    """
    if num_slots < 2:
        return None
    boxes = torch.zeros(len(_PAGES), num_slots, 4)
    labels = torch.full((len(_PAGES), num_slots), EMPTY)
    for page, elements in enumerate(_PAGES):
        kept = torch.tensor(elements[:num_slots])
        boxes[page, : len(kept)] = kept
        labels[page, : len(kept)] = torch.arange(len(kept)).add(page).remainder(len(classes))
    return Layouts.of(boxes, labels, classes)
