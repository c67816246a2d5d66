"""The page grammar: layouts of scientific pages, drawn from a few typographic rules.

A page has one to three columns between margins. It may open with a title block, and a float may
span its columns; then each column is filled from top to bottom with headings, paragraphs, lists,
figures with a caption below and tables with a caption above. Heights are whole lines. Everything
is aligned exactly, then shaken a little, as annotators do: without it the pages' alignment would
be 0, which no data set has.

The shares were chosen to resemble PubLayNet's pages, whose five classes the grammar uses.

References:
    PubLayNet: largest dataset ever for document layout analysis (Zhong et al., 2019),
    https://arxiv.org/abs/1908.07836
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from domains.layout.page.classes import CLASS_LISTS
from domains.layout.sources.packed import Element

__all__ = ["CLASSES", "draw_page"]

CLASSES = CLASS_LISTS["publaynet"]
_NUM_COLUMNS, _COLUMN_SHARES = (1, 2, 3), (0.34, 0.61, 0.05)
_TITLE_BLOCK, _WIDE_FLOAT, _RAGGED = 0.1, 0.36, 0.25
# Of the blocks of a column; the rest are paragraphs, some under a heading.
_LIST, _FIGURE, _TABLE, _HEADING = 0.055, 0.025, 0.015, 0.3
_MIN_LINES = 2  # of what is worth beginning at the bottom of a column
_MAX_ATTEMPTS = 1000


@dataclass
class _Sheet:
    """The measures of a page, in fractions of it, and the elements placed so far."""

    left: float
    right: float
    top: float
    bottom: float
    gutter: float
    line: float
    gap: float
    num_columns: int
    elements: list[Element] = field(default_factory=list)

    @property
    def column_width(self) -> float:
        """Width of each column."""
        free = self.right - self.left - (self.num_columns - 1) * self.gutter
        return free / self.num_columns


@dataclass
class _Column:
    """A strip that is filled from `y` down to `bottom`."""

    page: _Sheet
    left: float
    width: float
    y: float
    bottom: float

    @property
    def lines_left(self) -> int:
        return int((self.bottom - self.y) / self.page.line + 1e-9)

    def place(self, label: str, num_lines: float, indent: float = 0.0, width: float = 1.0) -> None:
        """Put a box of some lines at the current height, at a share of the strip's width."""
        height = num_lines * self.page.line
        left = self.left + indent * self.width
        self.page.elements.append(Element(label, left, self.y, width * self.width, height))
        self.y += height + self.page.gap


def draw_page(
    rng: random.Random, *, min_elements: int = 2, max_elements: int = 12, jitter: float = 0.0008
) -> list[Element]:
    """Draw a page, boxes in fractions of it; one with too few or too many elements is redrawn.

    Args:
        rng: What draws.
        min_elements: Elements a page has at least.
        max_elements: Elements a page has at most.
        jitter: Standard deviation of the noise on each edge, in fractions of the page.

    Raises:
        ValueError: No page of that size came up in 1000 attempts.
    """
    for _ in range(_MAX_ATTEMPTS):
        elements = _compose(rng).elements
        if min_elements <= len(elements) <= max_elements:
            return [_shaken(element, rng, jitter) for element in elements]
    raise ValueError(
        f"the page grammar has no pages of {min_elements} to {max_elements} elements: its pages "
        "have about 10"
    )


def _compose(rng: random.Random) -> _Sheet:
    page = _measures(rng)
    whole = _Column(page, page.left, page.right - page.left, page.top, page.bottom)
    if rng.random() < _TITLE_BLOCK:
        _title_block(whole, rng)
    bottom = page.bottom
    if rng.random() < _WIDE_FLOAT:
        if rng.random() < 0.25:
            bottom = _float_below(page, rng) - page.gap
        else:
            _figure_or_table(rng)(whole, rng)
    for number in range(page.num_columns):
        left = page.left + number * (page.column_width + page.gutter)
        end = bottom
        if number == page.num_columns - 1 and rng.random() < _RAGGED:
            end = whole.y + rng.uniform(0.15, 1.0) * (bottom - whole.y)
        _fill(_Column(page, left, page.column_width, whole.y, end), rng)
    return page


def _measures(rng: random.Random) -> _Sheet:
    left = rng.uniform(0.06, 0.11)
    num_columns = rng.choices(_NUM_COLUMNS, _COLUMN_SHARES)[0]
    if num_columns == 1 and rng.random() < 0.3:
        left = rng.uniform(0.12, 0.28)  # a wide outer margin, as some journals have it
    return _Sheet(
        left=left,
        right=1 - rng.uniform(0.06, 0.11),
        top=rng.uniform(0.06, 0.1),
        bottom=1 - rng.uniform(0.06, 0.11),
        gutter=rng.uniform(0.02, 0.035),
        line=rng.uniform(0.0125, 0.0155),
        gap=rng.uniform(0.004, 0.012),
        num_columns=num_columns,
    )


def _title_block(whole: _Column, rng: random.Random) -> None:
    """Title, authors and abstract across the page."""
    centred = rng.random() < 0.4
    for label, num_lines, low in (("title", rng.choice((2, 3)), 0.6), ("text", 1.5, 0.3)):
        width = rng.uniform(low, 0.95)
        whole.place(label, num_lines, (1 - width) / 2 if centred else 0.0, width)
    whole.place("text", rng.randint(6, 14))


def _float_below(page: _Sheet, rng: random.Random) -> float:
    """Put a wide float at the foot of the page; return its top."""
    trial = replace(page, elements=[])
    strip = _Column(trial, page.left, page.right - page.left, page.top, page.bottom)
    _figure_or_table(rng)(strip, rng)
    shift = page.bottom - (strip.y - page.gap)
    page.elements += [replace(e, top=e.top + shift) for e in trial.elements]
    return page.top + shift


def _figure_or_table(rng: random.Random) -> Callable[[_Column, random.Random], None]:
    return _figure if rng.random() < 0.6 else _table


def _figure(column: _Column, rng: random.Random) -> None:
    num_lines, width = _float_size(column, rng)
    column.place("figure", num_lines, (1 - width) / 2, width)
    if column.lines_left:
        column.place("text", min(column.lines_left, rng.randint(1, 6)))


def _table(column: _Column, rng: random.Random) -> None:
    num_lines, width = _float_size(column, rng)
    column.place("text", rng.randint(1, 3))
    column.place("table", max(1, min(num_lines, column.lines_left)), (1 - width) / 2, width)


def _float_size(column: _Column, rng: random.Random) -> tuple[int, float]:
    wide = column.width > 0.5
    num_lines = rng.randint(*((12, 36) if wide else (9, 28)))
    width = rng.uniform(0.7, 1.0) if wide and rng.random() < 0.7 else 1.0
    return min(num_lines, max(_MIN_LINES, column.lines_left - 3)), width


def _fill(column: _Column, rng: random.Random) -> None:
    """Fill a column from top to bottom."""
    while (left := column.lines_left) >= _MIN_LINES:
        kind = rng.random()
        if kind < _LIST:
            column.place("list", min(left, rng.randint(4, 16)), 0.03, 0.97)
        elif kind < _LIST + _FIGURE and left > 14:
            _figure(column, rng)
        elif kind < _LIST + _FIGURE + _TABLE and left > 14:
            _table(column, rng)
        elif rng.random() < _HEADING and left > 2 * _MIN_LINES:
            # Widths like those of real headings: most short, a few a full line.
            column.place("title", 1, width=min(1.0, 0.15 + rng.expovariate(4.5)))
            _paragraph(column, rng)
        else:
            _paragraph(column, rng)


def _paragraph(column: _Column, rng: random.Random) -> None:
    num_lines = _MIN_LINES + int(rng.gammavariate(1.2, 7.5))
    column.place("text", max(1, min(num_lines, column.lines_left)))


def _shaken(element: Element, rng: random.Random, jitter: float) -> Element:
    """Move each edge a little, inside the page; a quarter of the size is left at least."""
    left, top, right, bottom = (
        min(1.0, max(0.0, edge + rng.gauss(0.0, jitter)))
        for edge in (
            element.left,
            element.top,
            element.left + element.width,
            element.top + element.height,
        )
    )
    width, height = max(right - left, element.width / 4), max(bottom - top, element.height / 4)
    return Element(element.label, left, top, width, height)
