"""Layouts as pictures: labelled boxes for panels, PNG, SVG; and as JSON, the input format."""

import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from domains.layout.page.classes import color_of
from domains.layout.samples import Layouts
from domains.layout.sources.packed import Element, elements_of

__all__ = ["draw", "each", "save_layout", "to_image", "to_record", "to_svg"]

_PANEL = 192  # pixels of the longer side in panels
_FINE = 3  # pictures are drawn so many times larger and reduced: crisp lines of any width
_OPACITY = 0.35
_MIN_TEXT = 7  # pixels of the smallest label
_EDGE = (120, 120, 120)


def draw(layouts: Layouts, canvas: tuple[int, int]) -> Tensor:
    """Return pictures of layouts, [B, 3, H, W] in [0, 1], in the shape of the canvas."""
    scale = _PANEL / max(canvas)
    size = (round(scale * canvas[0]), round(scale * canvas[1]))
    pictures = [np.asarray(to_image(elements, layouts.classes, size)) for elements in each(layouts)]
    if not pictures:
        return torch.empty(0, 3, size[1], size[0])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def each(layouts: Layouts) -> list[list[Element]]:
    """Return the elements of each layout, boxes in fractions of the page."""
    boxes = layouts.boxes.detach().float().cpu().numpy()
    labels = layouts.labels.cpu().numpy().astype(np.int8)
    return [
        list(elements_of(box, label, layouts.classes))
        for box, label in zip(boxes, labels, strict=True)
    ]


def to_image(
    elements: list[Element], classes: tuple[str, ...], size: tuple[int, int]
) -> Image.Image:
    """Return a picture of one layout, large boxes below small ones, without those not finite.

    Args:
        elements: Boxes in fractions of the page.
        classes: Names of the labels, which give the colours.
        size: Width and height in pixels.
    """
    width, height = size
    elements = _finite(elements)
    fine = Image.new("RGB", (_FINE * width, _FINE * height), "white")
    pen = ImageDraw.Draw(fine, "RGBA")
    for element in sorted(elements, key=lambda e: -e.width * e.height):
        color = color_of(classes.index(element.label), classes)
        left, top = _FINE * width * element.left, _FINE * height * element.top
        right = max(left, left + _FINE * width * element.width)
        bottom = max(top, top + _FINE * height * element.height)
        fill = (*color, round(255 * _OPACITY))
        pen.rectangle((left, top, right, bottom), fill=fill, outline=color, width=_FINE)
    pen.rectangle((0, 0, fine.width - 1, fine.height - 1), outline=_EDGE, width=_FINE)
    picture = fine.resize(size, Image.Resampling.BOX)
    _write_labels(picture, elements, classes)
    return picture


def to_svg(elements: list[Element], classes: tuple[str, ...], canvas: tuple[int, int]) -> str:
    """Return one layout as an SVG document in the units of the canvas, without boxes not finite."""
    width, height = canvas
    elements = _finite(elements)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="{height / 66:.1f}">',
        f'<rect width="{width}" height="{height}" fill="white" stroke="gray"/>',
    ]
    for element in sorted(elements, key=lambda e: -e.width * e.height):
        left, top = element.left * width, element.top * height
        red, green, blue = color_of(classes.index(element.label), classes)
        color = f"rgb({red},{green},{blue})"
        parts.append(
            f'<rect x="{left:.2f}" y="{top:.2f}" width="{element.width * width:.2f}" '
            f'height="{element.height * height:.2f}" fill="{color}" fill-opacity="{_OPACITY}" '
            f'stroke="{color}"/>'
        )
        parts.append(
            f'<text x="{left + 3:.2f}" y="{top + height / 64:.2f}" fill="{color}">'
            f"{escape(element.label)}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def to_record(elements: list[Element], canvas: tuple[int, int]) -> dict[str, object]:
    """Return one layout as the record that `read_json` reads."""
    width, height = canvas
    return {
        "canvas": [width, height],
        "elements": [
            {
                "label": e.label,
                "box": [e.left * width, e.top * height, e.width * width, e.height * height],
            }
            for e in elements
        ],
    }


def save_layout(layout: Layouts, canvas: tuple[int, int], path: Path) -> Path:
    """Write one layout as `<path>.json`, `.svg` and `.png`; return the first."""
    (elements,) = each(layout)
    record = json.dumps(to_record(elements, canvas), indent=1)
    written = path.with_name(f"{path.name}.json")
    written.write_text(record + "\n", encoding="utf-8")
    drawn = to_svg(elements, layout.classes, canvas)
    path.with_name(f"{path.name}.svg").write_text(drawn, encoding="utf-8")
    to_image(elements, layout.classes, canvas).save(path.with_name(f"{path.name}.png"))
    return written


def _finite(elements: list[Element]) -> list[Element]:
    """Return the elements whose boxes can be drawn."""
    return [e for e in elements if all(map(math.isfinite, (e.left, e.top, e.width, e.height)))]


def _write_labels(picture: Image.Image, elements: list[Element], classes: tuple[str, ...]) -> None:
    """Write each class into its box where it fits."""
    pen, size = ImageDraw.Draw(picture), max(_MIN_TEXT, picture.height // 64)
    font = ImageFont.load_default(size)
    for element in elements:
        box_width, box_height = element.width * picture.width, element.height * picture.height
        if box_height < size + 1 or box_width < pen.textlength(element.label, font) + 4:
            continue
        place = (element.left * picture.width + 3, element.top * picture.height)
        color = color_of(classes.index(element.label), classes)
        dark = (color[0] // 2, color[1] // 2, color[2] // 2)
        pen.text(place, element.label, fill=dark, font=font)
