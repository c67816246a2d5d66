"""Measures of one layout: by hand, against slow loops, and their smooth twins."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from domains.layout.metrics import source_layouts
from domains.layout.networks.encoder import jittered
from domains.layout.page import measures
from domains.layout.pipeline import LayoutPipeline
from domains.layout.samples import EMPTY, Layouts
from domains.layout.sources import Grammar
from tests.domains.layout import slow
from tests.support import assert_close_in_rounding

NAMES = ("text", "title", "list", "table", "figure")


def layout(*elements: tuple[int, float, float, float, float], slots: int = 4) -> Layouts:
    """One layout of (label, left, top, right, bottom), in double precision."""
    boxes = torch.zeros(1, slots, 4, dtype=torch.float64)
    labels = torch.full((1, slots), EMPTY)
    for i, (label, left, top, right, bottom) in enumerate(elements):
        centre, size = [(left + right) / 2, (top + bottom) / 2], [right - left, bottom - top]
        boxes[0, i] = torch.tensor([*centre, *size], dtype=torch.float64)
        labels[0, i] = label
    return Layouts.of(boxes, labels, NAMES)


def noisy_pages(num: int = 400, seed: int = 0) -> Layouts:
    """Pages from nearly perfect to badly shaken, some of their elements lost."""
    real = source_layouts(Grammar(num, seed=7 + seed))
    generator = torch.Generator().manual_seed(seed)
    stds = torch.logspace(-4, -1, num)
    shaken = jittered(real, stds, generator)
    lost = torch.rand(shaken.labels.shape, generator=generator) < 0.15
    labels = shaken.labels.masked_fill(lost, EMPTY)
    return Layouts.of(shaken.boxes.double(), labels, shaken.classes)


def soft_pages(num: int = 400) -> Layouts:
    """What a pipeline decodes from pages with noise on boxes and class scores."""
    pipeline = LayoutPipeline(None)
    real = source_layouts(Grammar(num, seed=8))
    batch = {"boxes": real.boxes, "labels": real.labels, "classes": [NAMES] * num}
    x_0 = pipeline.states(batch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x_0.shape, generator=generator)
    stds = torch.logspace(-3.5, -0.7, num).view(-1, 1, 1)
    assert isinstance(x_0, Tensor)
    x_0 = torch.cat([x_0[..., :4] + stds * noise[..., :4], x_0[..., 4:] + 0.2 * noise[..., 4:]], -1)
    return pipeline.decode(x_0, pipeline.example().repeat(num))


def test_alignment_by_hand() -> None:
    # Left edges 0.1 and 0.12, nothing else within 0.02: both have 0.02 to the other.
    pair = layout((0, 0.1, 0.1, 0.5, 0.2), (0, 0.12, 0.43, 0.95, 0.77))
    assert measures.alignment(pair).item() == pytest.approx(-math.log(0.98), rel=1e-12)
    # A third, flush with the first's right edge: it and the first have 0, the second 0.02.
    three = layout((0, 0.1, 0.1, 0.5, 0.2), (0, 0.12, 0.43, 0.95, 0.77), (2, 0.3, 0.85, 0.5, 0.91))
    assert measures.alignment(three).item() == pytest.approx(-math.log(0.98) / 3, rel=1e-12)
    for few in (layout(), layout((0, 0.1, 0.1, 0.5, 0.2))):
        assert measures.alignment(few).item() == 0


def test_alignment_compares_with_padding_in_compat_alone() -> None:
    # The first box lies 0.01 from the page's left edge, where empty slots have theirs.
    elements = ((0, 0.01, 0.1, 0.5, 0.27), (0, 0.12, 0.43, 0.95, 0.77))
    padded, full = layout(*elements, slots=4), layout(*elements, slots=2)
    assert_close_in_rounding(measures.alignment(padded), measures.alignment(full))
    expected = -(math.log(0.99) + math.log(0.89)) / 2
    assert measures.alignment(full, compat=True).item() == pytest.approx(-math.log(0.89), rel=1e-9)
    assert measures.alignment(padded, compat=True).item() == pytest.approx(expected, rel=1e-9)


def test_overlap_by_hand() -> None:
    # A quarter of the first (area 0.16) covers the whole of the second (0.04); the third is apart.
    value = layout((0, 0.1, 0.1, 0.5, 0.5), (0, 0.3, 0.3, 0.5, 0.5), (1, 0.6, 0.6, 0.9, 0.9))
    assert measures.overlap(value).item() == pytest.approx((0.25 + 1) / 3, rel=1e-12)
    ignored = torch.tensor([1])
    assert measures.overlap(value, ignored=ignored).item() == pytest.approx(1.25 / 2, rel=1e-12)
    assert measures.overlap(layout((0, 0.1, 0.1, 0.5, 0.5))).item() == 0
    assert measures.overlap(layout()).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1 / 1440, 1 / 2560), (3e-4, 3e-4), (1e-7, 1e-7), (1e-12, 0.5)])
def test_measures_of_boxes_of_a_pixel_and_less(
    size: tuple[float, float], dtype: torch.dtype
) -> None:
    """Two of a kind overlap wholly, half-shifted ones by half, as boxes of any size do."""
    width, height = size
    places = [(0.3, 0.7, *size)] * 2 + [(0.5, 0.3, *size), (0.5, 0.3, 2 * width, height)]
    labels = torch.tensor([[0, 0, 1, 1]])
    pages = Layouts.of(torch.tensor([places], dtype=dtype), labels, NAMES)
    # The narrow one lies wholly in the wide one, of which it is half.
    assert measures.overlap(pages).item() == pytest.approx((1 + 1 + 1 + 0.5) / 4, rel=1e-6)
    assert measures.overlap(pages, ignored=torch.tensor([1])).item() == pytest.approx(1, rel=1e-6)
    assert measures.inside_page(pages).item() == pytest.approx(1, rel=1e-6)
    assert measures.alignment(pages).item() == 0
    edge = Layouts.of(torch.tensor([[(0.0, 0.5, *size)]], dtype=dtype), labels[:, :1], NAMES)
    assert measures.inside_page(edge).item() == pytest.approx(0.5, rel=1e-6)


def test_pixels_of_a_phone_overlap_as_on_a_grid() -> None:
    """One and two pixels wide at every offset: the exact shares, in single precision."""
    pixel = torch.tensor([1 / 1440, 1 / 2560])
    for column, shared in ((700, 1.0), (701, 0.5), (702, 0.0)):
        wide = torch.cat([torch.tensor([701.0, 2000.5]) * pixel, torch.tensor([2.0, 1.0]) * pixel])
        other = torch.cat([torch.tensor([column + 1.0, 2000.5]) * pixel, wide[2:]])
        pages = Layouts.of(torch.stack([wide, other])[None], torch.zeros(1, 2).long(), NAMES)
        assert measures.overlap(pages).item() == pytest.approx(shared, abs=2e-4)


@pytest.mark.parametrize("name", ["overlap", "inside_page"])
def test_gradients_at_tiny_boxes_are_those_of_finite_differences(name: str) -> None:
    pixel = torch.tensor([1 / 1440, 1 / 2560, 1 / 1440, 1 / 2560], dtype=torch.float64)
    places = [[200.0, 100.0, 1.0, 1.0], [200.3, 100.2, 1.0, 2.0], [0.2, 0.3, 1.0, 1.0]]
    grid = torch.tensor([places], dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(1, 3, dtype=torch.int64)

    def value(grid: Tensor) -> Tensor:
        measure: Callable[..., Tensor] = getattr(measures, name)
        return measure(Layouts.of(grid * pixel, labels, NAMES), smooth=True)

    assert torch.autograd.gradcheck(value, grid)
    flat = torch.tensor([[[0.5, 0.5, 0.0, 0.1], [0.5, 0.5, 0.0, 0.1], [0.5, 0.5, 0.0, 0.0]]])
    flat.requires_grad_()
    none = getattr(measures, name)(Layouts.of(flat, labels, NAMES), smooth=True)
    assert none.item() == 0 and torch.autograd.grad(none, flat)[0].isfinite().all()


def test_measures_match_slow_loops() -> None:
    pages = noisy_pages(60)
    elements = slow.lists(pages)
    slots = pages.labels.shape[1]
    wanted = [slow.alignment(e) for e in elements]
    torch.testing.assert_close(measures.alignment(pages), torch.tensor(wanted).double())
    wanted = [slow.alignment(e, slots - len(e)) for e in elements]
    torch.testing.assert_close(
        measures.alignment(pages, compat=True), torch.tensor(wanted).double()
    )
    wanted = [slow.overlap(e) for e in elements]
    torch.testing.assert_close(measures.overlap(pages), torch.tensor(wanted).double())


def test_coverage_by_hand() -> None:
    half = layout((0, 0.0, 0.0, 1.0, 0.5))
    assert measures.coverage(half).item() == pytest.approx(0.5)
    # Twice the same box, and one that overlaps half of it: the union counts.
    union = layout((0, 0, 0, 0.5, 0.5), (1, 0, 0, 0.5, 0.5), (2, 0.25, 0, 0.75, 0.5))
    assert measures.coverage(union).item() == pytest.approx(0.375)
    assert measures.coverage(layout((0, -1, -1, 2, 2))).item() == 1
    assert measures.coverage(layout()).item() == 0


def test_inside_page_and_sizes_by_hand() -> None:
    value = layout((0, -0.1, 0.2, 0.3, 0.4), (0, 0.1, 0.9, 0.2, 1.1), (0, 0.5, 0.5, 0.6, 0.6))
    assert measures.inside_page(value).item() == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert measures.inside_page(layout((0, 0.5, 0.5, 0.5, 0.6))).item() == 0
    sizes = layout((0, 0, 0, 0.03, 0.5), (0, 0, 0, 0.01, 0.5), (0, 0, 0, 0.5, 0.001))
    assert measures.share_of_size(sizes, 0.02, 0.006).item() == pytest.approx(1 / 3)


def test_gaps_by_hand() -> None:
    # One column with gaps 0.02 and 0.06, a second with one of 0.04; half-overlapping counts.
    value = layout(
        (0, 0.1, 0.1, 0.4, 0.2),
        (0, 0.1, 0.22, 0.4, 0.3),
        (0, 0.2, 0.36, 0.6, 0.4),
        (0, 0.65, 0.1, 0.9, 0.2),
        (0, 0.65, 0.24, 0.9, 0.3),
        slots=6,
    )
    gaps, found = measures.columns_below(value)
    assert found.tolist() == [[True, True, False, True, False, False]]
    assert gaps[found].tolist() == pytest.approx([0.02, 0.06, 0.04])
    deviation = torch.tensor([0.02, 0.06, 0.04]).std(correction=0).item()
    assert measures.gap_deviation(value).item() == pytest.approx(deviation, abs=1e-5)
    assert measures.gap_deviation(layout((0, 0, 0, 1, 0.1), (0, 0, 0.2, 1, 0.3))).item() == 0


SMOOTH: dict[str, Callable[..., Tensor]] = {
    "alignment": measures.alignment,
    "overlap": measures.overlap,
    "coverage": measures.coverage,
    "inside_page": measures.inside_page,
    "num_elements": measures.num_elements,
    "share_of_size": lambda x, **s: measures.share_of_size(x, 0.1, 0.02, **s),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("pages", [noisy_pages, soft_pages], ids=["hard", "soft"])
def test_smooth_twins_rank_layouts_as_the_exact_measures(
    name: str, pages: Callable[[], Layouts]
) -> None:
    layouts, measure = pages(), SMOOTH[name]
    exact, twin = measure(layouts), measure(layouts, smooth=True)
    assert len(exact.unique()) > 5
    # Many pages have an overlap of exactly 0: traces of it in the twin are no other rank.
    ranked = [values.double().round(decimals=5).numpy() for values in (exact, twin)]
    assert spearmanr(*ranked).statistic > 0.95


@pytest.mark.parametrize("name", [*SMOOTH, "gap_deviation"])
def test_gradients_are_finite_and_reach_what_they_should(name: str) -> None:
    layouts = noisy_pages(50)
    # Perfect alignment, equal gaps, no size at all: where roots and quotients could misbehave.
    odd = [layout(slots=12), layout(*[(0, 0.1, 0.1, 0.1, 0.1)] * 3, slots=12)]
    odd += [layout(*[(0, 0.1, i / 10, 0.9, i / 10 + 0.05) for i in range(8)], slots=12)]
    boxes = torch.cat([layouts.boxes, *(o.boxes for o in odd)]).requires_grad_()
    labels = torch.cat([layouts.labels, *(o.labels for o in odd)])
    presence = (labels != EMPTY).double().requires_grad_()
    measure: Any = SMOOTH.get(name, lambda x, **_: measures.gap_deviation(x))
    values = measure(Layouts(boxes, labels, presence, NAMES), smooth=True)
    assert values.isfinite().all()
    grads = torch.autograd.grad(values.sum(), (boxes, presence), allow_unused=True)
    for grad in grads:
        assert grad is None or grad.isfinite().all()
    if name != "num_elements":
        assert grads[0][:50].abs().sum() > 0
    if name != "gap_deviation":
        assert grads[1] is not None and grads[1].abs().sum() > 0


def test_ascent_on_the_twins_improves_the_exact_measures() -> None:
    pages = noisy_pages(40)
    boxes = pages.boxes.clone().requires_grad_()
    optimizer = torch.optim.Adam([boxes], lr=1e-3)
    for _ in range(100):
        moved = Layouts(boxes, pages.labels, pages.presence, NAMES)
        cost = measures.overlap(moved, smooth=True) + 10 * measures.alignment(moved, smooth=True)
        optimizer.zero_grad()
        cost.sum().backward()
        optimizer.step()
    after = Layouts(boxes.detach(), pages.labels, pages.presence, NAMES)
    for measure in (measures.overlap, measures.alignment):
        assert measure(after).mean() < 0.7 * measure(pages).mean()
