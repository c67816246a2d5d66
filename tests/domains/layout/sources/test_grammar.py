"""The page grammar: its rules, and how it compares with real pages."""

import random
from pathlib import Path

import numpy as np
import pytest

from domains.layout.samples import EMPTY
from domains.layout.sources import Grammar, PubLayNet
from domains.layout.sources.grammar import CLASSES, draw_page
from domains.layout.sources.packed import Element, Packed

REAL = Path(__file__).parents[4] / ".." / "shared/data/layouts/publaynet_20pages_coco.json"


def pages(num: int, **settings: float) -> list[list[Element]]:
    return [draw_page(random.Random(i), **settings) for i in range(num)]  # type: ignore[arg-type]


def shares(packed: Packed) -> np.ndarray:
    labels = packed.labels[packed.labels != EMPTY]
    return np.bincount(labels, minlength=len(CLASSES)) / len(labels)


def sizes(packed: Packed, label: str) -> np.ndarray:
    """Mean width and height of a class."""
    return packed.boxes[packed.labels == CLASSES.index(label)][:, 2:].mean(axis=0)


def test_pages_are_functions_of_the_seed() -> None:
    assert pages(20) == pages(20)
    assert pages(20) != [draw_page(random.Random(i + 1000)) for i in range(20)]
    few, many = Grammar(10, seed=3).load(), Grammar(30, seed=3).load()
    np.testing.assert_array_equal(few.boxes, many.boxes[:10])


def test_elements_lie_on_the_page_and_have_a_size() -> None:
    for page in pages(500, jitter=0.005):
        for e in page:
            assert e.label in CLASSES and e.width > 0 and e.height > 0
            assert e.left >= 0 and e.top >= 0
            assert e.left + e.width <= 1 + 1e-12 and e.top + e.height <= 1 + 1e-12


def test_without_jitter_nothing_overlaps_and_columns_are_aligned_exactly() -> None:
    for page in pages(300, jitter=0.0):
        for i, a in enumerate(page):
            for b in page[:i]:
                across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
                down = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
                assert min(across, down) < 1e-9
        lefts = [e.left for e in page if e.label in ("text", "title")]
        # A paragraph starts at its column's left edge: at most 3 of them, or centred title lines.
        assert len({round(left, 9) for left in lefts}) <= 6


def test_numbers_of_elements_are_kept_within_bounds() -> None:
    counts = {len(page) for page in pages(300, min_elements=4, max_elements=7)}
    assert counts == {4, 5, 6, 7}
    with pytest.raises(ValueError, match="no pages of 200 to 300 elements"):
        draw_page(random.Random(0), min_elements=200, max_elements=300)


def test_all_classes_and_all_numbers_of_columns_occur() -> None:
    packed = Grammar(500, max_elements=30).load()
    assert (shares(packed) > 0.005).all()


def test_statistics_resemble_those_of_real_pages(tmp_path: Path) -> None:
    if not REAL.is_file():
        pytest.skip("the real pages are not here")
    real = PubLayNet(str(REAL), max_elements=30, cache_dir=str(tmp_path)).load()
    made = Grammar(3000, max_elements=30).load()
    # 20 real pages have a standard error of 1.1 elements; the grammar has 10.5.
    numbers = [(p.labels != EMPTY).sum(axis=1).mean() for p in (real, made)]
    assert abs(numbers[0] - numbers[1]) < 2.2
    np.testing.assert_allclose(shares(made), shares(real), atol=0.03)
    for label, tolerance in (("text", 0.02), ("title", 0.02), ("list", 0.06), ("figure", 0.1)):
        np.testing.assert_allclose(sizes(made, label), sizes(real, label), atol=tolerance)
    covered = [float((p.boxes[..., 2] * p.boxes[..., 3]).sum(axis=1).mean()) for p in (real, made)]
    assert abs(covered[0] - covered[1]) < 0.05
