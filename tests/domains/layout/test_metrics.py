"""Metrics of pairs and of sets: by hand, against slow loops, and quick enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from domains.layout.metrics import (
    Diversity,
    LayoutMeasures,
    MaxIoU,
    SetDistances,
    box_wasserstein,
    class_total_variation,
    docsim,
    frechet_distance,
    max_iou,
    source_layouts,
)
from domains.layout.networks.encoder import jittered
from domains.layout.pipeline import LayoutPipeline
from domains.layout.samples import EMPTY, Layouts
from domains.layout.sources import Grammar, RicoArrays
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.evaluation.measurements import moments
from tests.domains.layout import slow
from tests.domains.layout.page.test_measures import NAMES, layout, noisy_pages
from tests.domains.layout.sources.test_formats import real


def conditions(rows: list[int]) -> Condition:
    return Condition(entries=[{}] * (max(rows) + 1), tables={}, rows=torch.tensor(rows))


def joined(*layouts: Layouts) -> Layouts:
    boxes, labels = (torch.cat([getattr(x, n) for x in layouts]) for n in ("boxes", "labels"))
    return Layouts.of(boxes, labels, NAMES)


def few_elements(num: int, seed: int) -> Layouts:
    """Pages of at most five elements of two classes, few enough to try all assignments."""
    pages = noisy_pages(num, seed).index(slice(None))
    labels = pages.labels[:, :5].where(pages.labels[:, :5] == EMPTY, pages.labels[:, :5] % 2)
    return Layouts.of(pages.boxes[:, :5], labels, NAMES)


def test_max_iou_by_hand() -> None:
    a = layout((0, 0, 0, 0.5, 0.5), (1, 0.5, 0.5, 1, 1))
    # The same text, the title shifted by half of its width: IoU 1 and 1/3.
    b = layout((1, 0.75, 0.5, 1.25, 1), (0, 0, 0, 0.5, 0.5))
    assert max_iou(a, b) == pytest.approx((1 + 1 / 3) / 2)
    # Layouts of other classes have no partner; a second copy finds the better one taken.
    other = layout((0, 0, 0, 0.5, 0.5))
    assert max_iou(joined(a, other), b) == pytest.approx((1 + 1 / 3) / 2)
    assert max_iou(joined(a, a), joined(a, b)) == pytest.approx((1 + (1 + 1 / 3) / 2) / 2)
    assert max_iou(a, other) == 0 and max_iou(a, a) == pytest.approx(1)


def test_max_iou_of_boxes_of_a_pixel() -> None:
    size = (1 / 1440, 1 / 2560)
    boxes = torch.tensor([[[0.6, 0.7, *size], [0.6, 0.2, 1e-8, 1e-8]]])
    a = Layouts.of(boxes, torch.tensor([[0, 1]]), NAMES)
    moved = boxes + torch.tensor([size[0] / 3, 0, 0, 0]) * torch.tensor([[1.0], [0.0]])
    # Two thirds of each are common: IoU 2 / 3 / (4 / 3).
    assert max_iou(a, Layouts.of(moved, a.labels, NAMES)) == pytest.approx(0.75, abs=1e-4)
    assert max_iou(a, a) == pytest.approx(1)


def test_background_classes_can_be_ignored() -> None:
    pages = joined(layout((0, 0, 0, 1, 1), (1, 0.1, 0.1, 0.2, 0.2), (1, 0.3, 0.3, 0.4, 0.4)))
    rows = conditions([0])
    assert LayoutMeasures().evaluate(pages, rows)["overlap"].item() == pytest.approx(2.02 / 3)
    assert LayoutMeasures(ignored=[NAMES[0]]).evaluate(pages, rows)["overlap"].item() == 0
    with pytest.raises(UsageError, match="ignored of LayoutMeasures names the class 'page'"):
        LayoutMeasures(ignored=["page"]).evaluate(pages, rows)


def test_max_iou_matches_slow_loops() -> None:
    a, b = few_elements(24, 0), few_elements(20, 1)
    wanted = slow.max_iou(slow.lists(a), slow.lists(b))
    assert 0.05 < wanted < 0.9
    assert max_iou(a, b) == pytest.approx(wanted, abs=1e-9)


def test_max_iou_of_a_thousand_shaken_layouts() -> None:
    pages = source_layouts(Grammar(1000, seed=3))
    generator = torch.Generator().manual_seed(0)
    shaken = jittered(pages, torch.full((1000,), 0.01), generator)
    assert 0.5 < max_iou(shaken, pages) < 1


def test_max_iou_as_a_metric() -> None:
    metric = MaxIoU(Grammar(60, seed=2), max_layouts=40)
    pages, rows = source_layouts(metric.source, 40), conditions(list(range(40)))
    assert metric.compare(metric.features(pages, rows)) == {"max_iou": pytest.approx(1)}
    shaken = jittered(pages, torch.full((40,), 0.02), torch.Generator().manual_seed(0))
    found = metric.compare(metric.features(shaken, rows))["max_iou"]
    assert found == max_iou(shaken, pages) and 0.3 < found < 0.99
    halves = [
        metric.features(shaken.index(rows.rows[part]), conditions(list(range(20))))
        for part in (slice(20), slice(20, 40))
    ]
    whole = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    assert metric.compare(whole)["max_iou"] == found


def test_max_iou_needs_the_classes_that_the_model_draws() -> None:
    pipeline = LayoutPipeline("grammar")
    MaxIoU(Grammar(8)).check(pipeline)
    other = MaxIoU(Grammar(8))
    other.source.classes = ("text", "title")
    with pytest.raises(UsageError, match=r"source has the classes .*leave MaxIoU out"):
        other.check(pipeline)


def test_docsim_by_hand_and_against_slow_loops() -> None:
    a = layout((0, 0, 0, 0.4, 0.9), (1, 0.5, 0, 0.9, 0.1))
    # The same text; a title of the same place, half as wide: areas 0.04 and 0.02.
    b = layout((0, 0, 0, 0.4, 0.9), (1, 0.6, 0, 0.8, 0.1))
    expected = (0.6 + 0.02**0.5 * 2 ** (-2 * 0.2)) / 2
    assert docsim(a, b) == pytest.approx([expected])
    assert docsim(a, layout((2, 0, 0, 0.4, 0.9))) == pytest.approx([0])
    first, second = few_elements(30, 2), few_elements(30, 3)
    wanted = [slow.docsim(x, y) for x, y in zip(slow.lists(first), slow.lists(second), strict=True)]
    np.testing.assert_allclose(docsim(first, second), wanted, atol=1e-9)


def test_diversity_is_0_for_copies_and_rises_with_difference() -> None:
    pages = source_layouts(Grammar(12, seed=5))
    copies = pages.index(torch.zeros(12, dtype=torch.int64))
    rows = conditions([0] * 12)
    same = Diversity().evaluate(copies, rows)["diversity"]
    assert same.abs().max() < 1e-9
    generator = torch.Generator().manual_seed(0)
    near = jittered(copies, torch.full((12,), 0.02), generator)
    values = [Diversity(11).evaluate(x, rows)["diversity"].mean().item() for x in (near, pages)]
    assert 0.01 < values[0] < values[1] < 1
    # All pairs, by the definition.
    elements = slow.lists(pages)
    apart = {}
    for i, x in enumerate(elements):
        for j, y in enumerate(elements[:i]):
            larger, smaller = max(len(x), len(y)), min(len(x), len(y))
            own = self_similarity(x) * self_similarity(y)
            apart[i, j] = 1 - float(pair(pages, i, j)) * smaller / larger / own**0.5
    without = [np.mean([x for key, x in apart.items() if i not in key]) for i in range(12)]
    wanted = 12 * np.mean([*apart.values()]) - 11 * np.array(without)
    found = Diversity(11).evaluate(pages, rows)["diversity"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("num", [12, 64])
def test_the_error_of_diversity_is_the_true_deviation(num: int) -> None:
    # One box, of the second class with probability 0.2: two pages are the same or have nothing in
    # common, with variance 0.2176; the mean over the other page has variance 0.0576. Of 64 pages
    # each is compared with 8, of 12 with all; pairs that share a page depend on each other.
    draws, found = torch.Generator().manual_seed(0), []
    shared, pairs = (2 * 15, 64 * 8) if num == 64 else (2 * (num - 2), num * (num - 1) / 2)
    true = (0.2176 + shared * 0.0576) / pairs
    box = torch.tensor([0.2, 0.2, 0.7, 0.7]).expand(num, 1, 4)
    for _ in range(150):
        labels = (torch.rand(num, 1, generator=draws) < 0.2).long()
        pages = Layouts.of(box, labels, NAMES)
        values = Diversity().evaluate(pages, conditions([0] * num))["diversity"]
        found.append(moments(values, torch.arange(num)))
    reported = sum(one["sem"] ** 2 for one in found) / len(found)
    assert reported**0.5 == pytest.approx(true**0.5, rel=0.1)
    assert sum(one["mean"] for one in found) / len(found) == pytest.approx(0.32, abs=0.02)


def self_similarity(elements: list[slow.SlowElement]) -> float:
    return sum(slow.area(e) ** 0.5 for e in elements) / len(elements)


def pair(pages: Layouts, i: int, j: int) -> float:
    return docsim(pages.index(slice(i, i + 1)), pages.index(slice(j, j + 1)))[0]


def test_pages_without_elements_or_area_are_the_same() -> None:
    empty = joined(*[layout()] * 3)
    flat = joined(*[layout((0, 0.5, 0.5, 0.5, 0.5), (1, 0.2, 0.1, 0.2, 0.3))] * 3)
    for pages in (empty, flat):
        assert Diversity().evaluate(pages, conditions([0] * 3))["diversity"].tolist() == [0] * 3
    # Beside a page with area an empty one has nothing in common with it.
    mixed = joined(layout(), layout((0, 0, 0, 0.5, 0.5)))
    assert Diversity().evaluate(mixed, conditions([0, 0]))["diversity"].tolist() == [1, 1]
    tiny = joined(*[layout((0, 0.5, 0.5, 0.5 + 1e-14, 0.5 + 1e-14))] * 2)
    found = Diversity().evaluate(tiny, conditions([0, 0]))["diversity"]
    np.testing.assert_allclose(found, 0, atol=1e-9)


def test_normalised_docsim_by_hand() -> None:
    a, b = layout((0, 0.3, 0.3, 0.7, 0.7)), layout((0, 0.3, 0.3, 0.7, 0.7), (0, 0, 0, 0.1, 0.1))
    # The common box's weight is 0.4, of two elements; to themselves 0.4 and (0.4 + 0.1) / 2.
    expected = 0.4 / 2 / (0.4 * 0.25) ** 0.5
    assert docsim(a, b, normalised=True) == pytest.approx([expected])
    assert docsim(a, b) == pytest.approx([0.4])


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_pages_with_a_box_that_is_not_finite(lost: float) -> None:
    pages = source_layouts(Grammar(40, seed=5))
    boxes = pages.boxes.clone()
    boxes[0, 0, 1] = lost
    boxes[~pages.valid] = lost  # anything may be in empty slots
    spoilt, rows = Layouts.of(boxes, pages.labels, NAMES), conditions([0] * 40)
    rest, others = pages.index(slice(1, 40)), conditions([0] * 39)
    found = Diversity(39).evaluate(spoilt, rows)["diversity"]
    assert found[0].isnan()
    expected = Diversity(38).evaluate(rest, others)["diversity"]
    np.testing.assert_allclose(found[1:], expected, atol=1e-9)
    measured = LayoutMeasures().evaluate(spoilt, rows)
    for name in ("alignment_100", "overlap", "coverage"):
        assert measured[name].isnan().nonzero().flatten().tolist() == [0], name
    metric = SetDistances(max_layouts=64)
    features = metric.features(spoilt, rows)
    whole, without = metric.compare(features), metric.compare(metric.features(rest, others))
    for name in ("fid", "kid"):
        assert whole[name] == pytest.approx(without[name], rel=1e-6)
    assert 0 <= whole["box_wasserstein"] < 0.1
    pairs = torch.tensor([[0, 1], [2, 3]])
    assert all(x.isnan().all() for part in metric.left_out(features, pairs).values() for x in part)
    assert 0 < max_iou(spoilt, pages) < 1


def test_diversity_is_within_conditions() -> None:
    pages = source_layouts(Grammar(4, seed=5))
    doubled = pages.index(torch.tensor([0, 1, 0, 1, 2]))
    values = Diversity().evaluate(doubled, conditions([0, 1, 0, 1, 2]))["diversity"]
    assert values[:4].abs().max() < 1e-9 and values[4].isnan()


def test_set_distances_by_hand() -> None:
    a = joined(layout((0, 0, 0, 1, 1), (0, 0, 0, 1, 1)), layout((1, 0, 0, 1, 1)))
    b = joined(layout((0, 0, 0, 0.5, 1)), layout((2, 0, 0, 0.5, 1)))
    # Shares (2/3, 1/3, 0) and (1/2, 0, 1/2).
    assert class_total_variation(a, b) == pytest.approx(0.5)
    # Widths 1 and 0.5, centres 0.5 and 0.25, the rest equal.
    assert box_wasserstein(a, b) == pytest.approx((0.5 + 0.25) / 4)
    assert class_total_variation(a, a) == 0 and box_wasserstein(a, a) == 0
    assert box_wasserstein(a, joined(layout())) == 1
    assert class_total_variation(a, joined(layout())) == 1


def test_frechet_distance_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=generator).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exactly white
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    scales, shift = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 0.0, -1.0]).double()
    expected = float(shift.square().sum() + (scales - 1).square().sum())
    assert frechet_distance(x, x * scales + shift) == pytest.approx(expected, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())[0]
    y = (x * scales) @ turn
    assert frechet_distance(y, x) == pytest.approx(float((scales - 1).square().sum()), rel=1e-6)
    assert np.isnan(frechet_distance(x[:1], x))


def test_set_distances_grow_with_jitter_and_do_not_depend_on_batches() -> None:
    pages, metric = source_layouts(Grammar(300, seed=11)), SetDistances(max_layouts=300)
    generator, values = torch.Generator().manual_seed(0), []
    for std in (0.0, 0.02, 0.1):
        shaken = jittered(pages, torch.full((300,), std), generator)
        halves = [shaken.index(slice(0, 100)), shaken.index(slice(100, 300))]
        parts = [metric.features(half, conditions([0] * len(half))) for half in halves]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        whole = metric.compare(metric.features(shaken, conditions([0] * 300)))
        assert metric.compare(joined) == pytest.approx(whole, rel=1e-4)
        values.append(whole)
    for name in ("fid", "kid"):
        assert values[0][name] < values[1][name] < values[2][name]
    assert values[0]["class_tv"] < 0.05 and values[0]["box_wasserstein"] < 0.02


def test_layout_measures_of_real_screens(tmp_path: Path) -> None:
    path = real("rico25_max20_val.npz")
    screens = source_layouts(RicoArrays(str(path), cache_dir=str(tmp_path)))
    rows = conditions([0] * len(screens))
    right, compat = (LayoutMeasures(c).evaluate(screens, rows) for c in (False, True))
    assert all(v.isfinite().all() for v in [*right.values(), *compat.values()])
    # Zero boxes as partners bring lines nearer; elements without another then have one at all.
    several = screens.num_elements > 1
    near, far = (values["alignment_100"][several] for values in (compat, right))
    assert (near <= far + 1e-4).all() and near.mean() < far.mean()
    assert not right["alignment_100"][~several].any() and compat["alignment_100"][~several].any()


def test_other_classes_are_told_before_anything_is_drawn(
    tiny_pipeline: Callable[..., LayoutPipeline],
) -> None:
    own = tiny_pipeline(classes=("logo", "photo"))
    with pytest.raises(UsageError, match=r"pretrained has the classes.*leave SetDistances out"):
        SetDistances().check(own)
    with pytest.raises(UsageError, match="LayoutMeasures names the class 'text'"):
        LayoutMeasures(ignored=["text"]).check(own)
    other, nameless = Grammar(8), cast(Any, object())
    other.classes = ("logo", "photo")
    with pytest.raises(UsageError, match=r"pretrained has the classes.*leave SetDistances out"):
        SetDistances(other).check(nameless)
    LayoutMeasures(ignored=["text"]).check(tiny_pipeline())


def test_a_source_of_other_classes_is_told(tiny_pipeline: Callable[..., LayoutPipeline]) -> None:
    metric = SetDistances()
    metric.source.classes = ("logo", "photo")
    with pytest.raises(UsageError, match="source has the classes"):
        metric.check(tiny_pipeline())
