"""Pages as files have them: checked, counted, put in reading order and packed into arrays."""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from domains.layout.samples import EMPTY
from lit_rlft.kit.bad_entries import BadEntry, Report, usable

__all__ = [
    "Element",
    "LeaveOut",
    "Packed",
    "Page",
    "elements_of",
    "pack",
    "reading_order",
]

_TOLERANCE = 2e-3  # of the canvas, by which a box may stick out: rounding, about one pixel
_WIDE, _COLUMN_GAP = 0.55, 0.1  # of the page
_UNKNOWN = "a class that is not in the list"
_MAX_NAMES = 5  # of classes in a message

LeaveOut = Literal["elements", "layouts"]
"""What a bad element costs: itself, or its layout."""


@dataclass(frozen=True)
class Element:
    """A labelled box: left, top, width and height in units of the canvas."""

    label: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Page:
    """One entry of a file: its name there, the size of its canvas, its elements."""

    name: str
    width: float
    height: float
    elements: Sequence[Element]


@dataclass(frozen=True)
class Packed:
    """n layouts of at most N elements, each in reading order, empty slots last.

    Attributes:
        boxes: float32 [n, N, 4] centre x, centre y, width, height in fractions of the canvas.
        labels: int8 [n, N], `EMPTY` where there is no element.
        canvases: float32 [n, 2] width and height of each canvas in its own units.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]
    canvases: NDArray[np.float32]

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)


def pack(
    entries: Iterable[Page | BadEntry],
    classes: Sequence[str],
    max_elements: int,
    *,
    source: str,
    strict: bool = False,
    leave_out: LeaveOut = "layouts",
) -> tuple[Packed, Report]:
    """Check entries and pack the good ones.

    Args:
        entries: Pages, or what is wrong with an entry that could not be read.
        classes: Names of the labels.
        max_elements: N.
        source: The file, for messages.
        strict: Stop at the first bad entry instead of leaving it out.
        leave_out: What a bad element costs: itself, or its layout.

    Raises:
        UsageError: An entry is bad and `strict`, or no entry is good.
    """
    report = Report(source, "layouts", strict)
    numbers = {name: i for i, name in enumerate(classes)}
    # Flat arrays: a Python object per page would take several times their memory.
    boxes, labels, canvases = array("f"), array("b"), array("f")
    unknown: set[str] = set()

    def sound(entry: Page | BadEntry) -> Page | BadEntry:
        if isinstance(entry, BadEntry):
            return entry
        unknown.update(e.label for e in entry.elements if e.label not in numbers)
        return _without_bad(entry, numbers, report) if leave_out == "elements" else entry

    pages = map(sound, entries)
    for page in usable(pages, lambda page: _fault(page, numbers, max_elements), report):
        _append(page, numbers, max_elements, boxes, labels)
        canvases.extend((page.width, page.height))
    report.remedies = {
        _UNKNOWN: f"set classes to the file's own names, such as {sorted(unknown)[:_MAX_NAMES]}",
        f"more elements than the {max_elements} slots": "raise max_elements",
    }
    report.check()
    packed = Packed(
        np.frombuffer(boxes, np.float32).reshape(-1, max_elements, 4),
        np.frombuffer(labels, np.int8).reshape(-1, max_elements),
        np.frombuffer(canvases, np.float32).reshape(-1, 2),
    )
    return packed, report


def reading_order(edges: NDArray[np.float64]) -> list[int]:
    """Return the order in which boxes are read: wide ones split a page, columns left to right.

    Args:
        edges: [n, 4] left, top, right, bottom in fractions of the page.
    """
    middles = (edges[:, 1] + edges[:, 3]) / 2
    wide = edges[:, 2] - edges[:, 0] > _WIDE
    # Sections are counted by the wide boxes above; a wide box opens the section below it.
    sections = (middles[wide][None, :] < middles[:, None]).sum(axis=1)
    by_left = np.argsort(edges[:, 0], kind="stable")
    jumps = np.diff(edges[by_left, 0], prepend=edges[by_left[:1], 0]) > _COLUMN_GAP
    columns = np.empty(len(edges), np.int64)
    columns[by_left] = np.cumsum(jumps)
    columns[wide] = 1 + columns.max(initial=0)  # after the columns above it
    keys = zip(sections.tolist(), columns.tolist(), edges[:, 1].tolist(), strict=True)
    return [i for _, i in sorted((key, i) for i, key in enumerate(keys))]


def _fault(page: Page, numbers: dict[str, int], max_elements: int) -> BadEntry | None:
    """Return what is wrong with a page, or None."""
    if not (_positive(page.width) and _positive(page.height)):
        return BadEntry(page.name, "a canvas without a size", f"{page.width} x {page.height}")
    if not page.elements:
        return BadEntry(page.name, "no elements")
    for i, element in enumerate(page.elements):
        bad = _element_fault(page, i, element, numbers)
        if bad is not None:
            return bad
    if len(page.elements) > max_elements:
        kind = f"more elements than the {max_elements} slots"
        return BadEntry(page.name, kind, f"{len(page.elements)} elements")
    return None


def _element_fault(
    page: Page, i: int, element: Element, numbers: dict[str, int]
) -> BadEntry | None:
    """Return what is wrong with an element of a page, or None."""
    box = (element.left, element.top, element.width, element.height)
    detail = f"element {i}: {element.label} at {[*box]}"
    if element.label not in numbers:
        return BadEntry(page.name, _UNKNOWN, detail)
    if not all(map(math.isfinite, box)):
        return BadEntry(page.name, "a box that is not finite", detail)
    if element.width <= 0 or element.height <= 0:
        return BadEntry(page.name, "an empty box", detail)
    if not _inside(element, page):
        return BadEntry(page.name, "a box outside the canvas", detail)
    return None


def _without_bad(page: Page, numbers: dict[str, int], report: Report) -> Page:
    """Return a page without its bad elements; as it is where none or no other would be left."""
    if not (_positive(page.width) and _positive(page.height)):
        return page
    faults = [_element_fault(page, i, e, numbers) for i, e in enumerate(page.elements)]
    good = [e for e, bad in zip(page.elements, faults, strict=True) if bad is None]
    if not good or len(good) == len(faults):
        return page
    for bad in filter(None, faults):
        report.leave_out_part(bad)
    return replace(page, elements=good)


def _positive(size: float) -> bool:
    return math.isfinite(size) and size > 0


def _inside(element: Element, page: Page) -> bool:
    dx, dy = _TOLERANCE * page.width, _TOLERANCE * page.height
    right, bottom = element.left + element.width, element.top + element.height
    across = element.left >= -dx and right <= page.width + dx
    return across and element.top >= -dy and bottom <= page.height + dy


def _append(
    page: Page,
    numbers: dict[str, int],
    max_elements: int,
    boxes: "array[float]",
    labels: "array[int]",
) -> None:
    size = np.array([page.width, page.height])
    corner = np.array([(e.left, e.top) for e in page.elements]) / size
    opposite = corner + np.array([(e.width, e.height) for e in page.elements]) / size
    edges = np.concatenate([corner, opposite], axis=1).clip(0, 1)
    order = reading_order(edges)
    centres = (edges[order, :2] + edges[order, 2:]) / 2
    sizes = edges[order, 2:] - edges[order, :2]
    num_empty = max_elements - len(order)
    boxes.extend(np.concatenate([centres, sizes], axis=1).ravel().tolist())
    boxes.extend([0.0] * 4 * num_empty)
    labels.extend(numbers[page.elements[i].label] for i in order)
    labels.extend([EMPTY] * num_empty)


def elements_of(
    boxes: NDArray[np.float32], labels: NDArray[np.int8], classes: Sequence[str]
) -> Iterator[Element]:
    """Iterate over the elements of one packed layout, boxes in fractions of the canvas."""
    for (x, y, width, height), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        if label != EMPTY:
            yield Element(classes[label], x - width / 2, y - height / 2, width, height)
