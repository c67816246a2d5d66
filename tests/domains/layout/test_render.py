"""Pictures of layouts: boxes where they belong, in their colours; SVG and JSON."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domains.layout.page.classes import color_of
from domains.layout.pipeline import LayoutPipeline
from domains.layout.render import draw, save_layout, to_image, to_record, to_svg
from domains.layout.sources.packed import Element
from lit_rlft.core.pipeline import Condition
from tests.domains.layout.page.test_measures import NAMES, layout

CANVAS = (612, 792)
BOXES = [Element("figure", 0.25, 0.5, 0.5, 0.25), Element("text", 0.1, 0.1, 0.8, 0.2)]


def mixed(name: str) -> np.ndarray:
    """The colour of a box's inside: a class's colour over white."""
    return 255 - 0.35 * (255 - np.array(color_of(NAMES.index(name), NAMES)))


def test_boxes_are_filled_where_they_are_and_nowhere_else() -> None:
    pixels = np.asarray(to_image(BOXES, NAMES, (200, 400))).astype(float)
    assert pixels.shape == (400, 200, 3)
    np.testing.assert_allclose(pixels[250, 100], mixed("figure"), atol=2)
    np.testing.assert_allclose(pixels[110, 150], mixed("text"), atol=2)
    for row, column in ((20, 100), (250, 20), (350, 100), (150, 100)):
        assert (pixels[row, column] == 255).all()
    # Outlines in the full colour, one pixel wide.
    edge = np.array(color_of(NAMES.index("figure"), NAMES))
    np.testing.assert_allclose(pixels[250, 50], edge, atol=40)


def test_small_boxes_lie_on_top_of_large_ones() -> None:
    small, large = Element("title", 0.4, 0.4, 0.2, 0.2), Element("text", 0.1, 0.1, 0.8, 0.8)
    pictures = [
        np.asarray(to_image(e, NAMES, (100, 100))) for e in ([small, large], [large, small])
    ]
    np.testing.assert_array_equal(*pictures)
    assert (pictures[0][50, 58] != pictures[0][50, 80]).any()


def test_labels_are_written_where_they_fit() -> None:
    wide, flat = Element("text", 0.1, 0.1, 0.8, 0.5), Element("text", 0.1, 0.7, 0.8, 0.01)
    pixels = np.asarray(to_image([wide, flat], NAMES, (120, 160))).astype(int)
    dark = (pixels.sum(axis=2) < 300).any(axis=1)
    assert dark[16:32].any() and not dark[40:150].any()


def test_boxes_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    good = layout((0, 0.1, 0.1, 0.9, 0.3))
    for lost in (float("nan"), float("inf")):
        page = layout((0, 0.1, 0.1, 0.9, 0.3), (1, lost, 0.5, 0.9, 0.9))
        assert torch.equal(draw(page, CANVAS), draw(good, CANVAS))
        assert torch.equal(
            draw(layout((0, lost, lost, lost, lost)), CANVAS), draw(layout(), CANVAS)
        )
        save_layout(page, CANVAS, tmp_path / "page")
        assert (tmp_path / "page.svg").read_text().count("<text") == 1


def test_panels_have_the_shape_of_the_canvas_and_survive_bad_boxes() -> None:
    good = layout((0, 0.1, 0.1, 0.9, 0.3))
    bad = layout((0, -5.0, 0.5, 7.0, 0.6), (1, 0.5, 0.5, 0.5, 0.5), (2, 0.9, 1.5, 1.2, 1.9))
    for page in (good, bad, layout()):
        picture = draw(page, CANVAS)
        assert picture.shape == (1, 3, 192, 148)
        assert picture.min() >= 0 and picture.max() <= 1
    assert draw(good.index(slice(0, 0)), CANVAS).shape == (0, 3, 192, 148)
    white = (draw(good, CANVAS) == 1).all(dim=1)
    assert not white[0, 40, 70] and white[0, 150, 70]


def test_svg_and_json_hold_every_box(tmp_path: Path) -> None:
    root = ET.fromstring(to_svg(BOXES, NAMES, CANVAS))
    space = "{http://www.w3.org/2000/svg}"
    page, *boxes = root.findall(f"{space}rect")
    assert page.attrib["width"] == "612" and len(boxes) == 2
    first = {k: float(boxes[0].attrib[k]) for k in ("x", "y", "width", "height")}
    text = {"x": 0.1 * 612, "y": 0.1 * 792, "width": 0.8 * 612, "height": 0.2 * 792}
    assert first == pytest.approx(text, abs=0.01)  # the larger one comes first
    assert [t.text for t in root.findall(f"{space}text")] == ["text", "figure"]
    ET.fromstring(to_svg([Element("a<b&c", 0, 0, 1, 1)], ("a<b&c",), CANVAS))
    record = to_record(BOXES, CANVAS)
    assert record["canvas"] == [612, 792]
    path = save_layout(layout((1, 0.25, 0.5, 0.75, 0.75)), CANVAS, tmp_path / "page.v1")
    assert path.name == "page.v1.json"
    with Image.open(tmp_path / "page.v1.png") as picture:
        assert picture.size == CANVAS


def test_reports_show_layouts_as_svg() -> None:
    pages = layout(
        (NAMES.index("text"), 0.1, 0.1, 0.9, 0.3), (NAMES.index("figure"), 0.2, 0.5, 0.7, 0.8)
    )
    pipeline = LayoutPipeline(pretrained="grammar")
    (figure,) = pipeline.figures(pages, Condition([], {}, torch.zeros(1).long()))
    root = ET.fromstring(figure.svg)
    boxes = [part for part in root if part.get("fill-opacity")]
    assert len(boxes) == 2 and root.get("viewBox") == "0 0 {} {}".format(*CANVAS)
    assert figure.body is None
