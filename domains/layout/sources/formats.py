"""Readers of layout files: each yields the pages of a format, or what is wrong with an entry."""

import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.layout.sources.packed import Element, Page
from domains.layout.sources.streaming import JSONStream
from lit_rlft.core.checks import UsageError, from_json
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.files import encoding, existing, listed, reason

__all__ = ["page_of", "read_arrays", "read_coco", "read_json", "read_rico"]

Entry = Page | BadEntry

_ARRAYS = ("bbox_ltwh", "label", "classes", "canvas_wh", "name")  # what is read of an .npz file


def read_coco(path: Path) -> Iterator[Entry]:
    """Iterate over the images of a COCO file such as PubLayNet's train.json, in its order.

    The file is streamed: only image, category and box of each annotation are kept, 48 bytes.

    Raises:
        UsageError: The file is missing, cut off, or has no images, annotations and categories.
    """
    coco = _Coco(existing(path))
    owners, categories = (np.frombuffer(ids, np.int64) for ids in (coco.owners, coco.categories))
    boxes = np.frombuffer(coco.boxes, np.float64).reshape(-1, 4)
    order = np.argsort(owners, kind="stable")
    known = np.fromiter(coco.images, np.int64, len(coco.images))
    firsts, lasts = (np.searchsorted(owners[order], known, side) for side in ("left", "right"))
    for number, first, last in zip(known.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        rows = order[first:last]
        found = zip(categories[rows].tolist(), boxes[rows].tolist(), strict=True)
        elements = [Element(coco.names.get(c, f"category {c}"), *box) for c, box in found]
        yield Page(f"image {number}", *coco.images[number], elements)
    for number in np.setdiff1d(owners, known).tolist():
        yield BadEntry(f"image {number}", "annotations but no entry among the images")


def read_rico(folder: Path) -> Iterator[Entry]:
    """Iterate over RICO's semantic annotations: a folder of view hierarchies, a JSON file each.

    Every node with a `componentLabel` is an element; `bounds` are left, top, right, bottom. The
    canvas is the root's box. Landscape screens are left out, as the literature does.

    Raises:
        UsageError: There is no such folder, or it holds no JSON files.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give RICO's folder of semantic annotations")
    paths = sorted(listed(folder, "*.json"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UsageError(f"{folder} holds no .json files; give RICO's semantic annotations")
    for path in paths:
        try:
            root = from_json(path.read_text(encoding=encoding(path)))
            left, top, right, bottom = map(_number, root["bounds"])
            nodes = list(_labelled(root))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield BadEntry(path.name, "no readable view hierarchy", reason(error))
            continue
        if right - left > bottom - top:
            yield BadEntry(path.name, "a landscape canvas", f"{right - left} x {bottom - top}")
            continue
        elements = [
            Element(label, x - left, y - top, x_end - x, y_end - y)
            for label, (x, y, x_end, y_end) in nodes
        ]
        yield Page(path.name, right - left, bottom - top, elements)


def read_arrays(path: Path, classes: Sequence[str]) -> Iterator[Entry]:
    """Iterate over the layouts of an .npz file of arrays.

    It holds `bbox_ltwh` [n, N, 4] in fractions of the canvas, `label` [n, N] with 0 for padding,
    and perhaps `classes` [C + 1] (the first for padding), `canvas_wh` [n, 2] and `name` [n]. The
    latter two serve reports alone: where they do not fit the layouts, or a canvas has no size, a
    page of 1 x 1 and the row's number stand in.

    Args:
        path: The file.
        classes: Names of the labels 1, 2, ...; the file's own must be the same.

    Raises:
        UsageError: The file is missing or lacks an array, shapes do not fit, or its class list is
            another one.
    """
    source = existing(path)
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in _ARRAYS}
        boxes, labels = arrays["bbox_ltwh"].astype(np.float64), arrays["label"].astype(np.int64)
    except Exception as error:  # numpy reads headers as Python, which fails in many ways
        raise UsageError(
            f"{path} is no .npz file with arrays bbox_ltwh and label ({reason(error)})"
        ) from error
    own = [str(name) for name in np.ravel(arrays.get("classes", []))][1:]
    if own and own != list(classes):
        raise UsageError(
            f"{path} has the classes {own}, but {list(classes)} were asked for; set classes to its "
            "own"
        )
    if labels.ndim != 2 or boxes.shape != (*labels.shape, 4):
        raise UsageError(
            f"{path} has bbox_ltwh {boxes.shape} and label {labels.shape}; they must be [n, N, 4] "
            "and [n, N]"
        )
    canvases = arrays.get("canvas_wh")
    if canvases is None or canvases.shape != (len(labels), 2):
        canvases = np.ones((len(labels), 2))
    names = [str(name) for name in np.ravel(arrays.get("name", []))]
    names = names if len(names) == len(labels) else [f"row {i}" for i in range(len(labels))]
    for name, canvas, box, label in zip(names, canvases, boxes, labels, strict=True):
        width, height = canvas if np.isfinite(canvas).all() and (canvas > 0).all() else (1, 1)
        scaled = box.astype(np.float64) * np.array([width, height, width, height], np.float64)
        elements = [
            Element(_class_of(number, classes), *values)
            for number, values in zip(label.tolist(), scaled.tolist(), strict=True)
            if number
        ]
        yield Page(name, float(width), float(height), elements)


def read_json(path: Path) -> Iterator[Entry]:
    """Iterate over layouts in this project's own format.

    A layout is `{"canvas": [width, height], "elements": [{"label": "text", "box": [left, top,
    width, height]}, ...]}`, boxes in units of the canvas. `path` is a .jsonl file with one a line,
    or a folder of .json files with one each, as `lit-rlft predict` writes them.

    Raises:
        UsageError: There is no such file or folder, or the folder holds no .json files.
    """
    if path.is_dir():
        files = listed(path, "*.json")
        if not files:
            raise UsageError(f"{path} holds no .json files; give a .jsonl file or such a folder")
        for file in files:
            yield page_of(file.name, file.read_bytes().decode(encoding(file), errors="replace"))
        return
    with existing(path).open(encoding=encoding(path), errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield page_of(f"line {number}", line)


class _Coco:
    """The parts of a COCO file that are kept.

    A faulty annotation is kept too, with a category or box that no page can have.

    Attributes:
        images: Width and height by image id.
        owners: Image ids of the annotations.
        categories: Category ids of the annotations; -1 where there is none.
        boxes: Four numbers per annotation.
        names: Names by category id.
    """

    def __init__(self, path: Path) -> None:
        self.images: dict[int, tuple[float, float]] = {}
        self.owners, self.categories, self.boxes = array("q"), array("q"), array("d")
        self.names: dict[int, str] = {}
        readers = {
            "images": self._image,
            "annotations": self._annotation,
            "categories": self._category,
        }
        missing = set(readers)
        with JSONStream(path) as stream:
            for key in stream.keys():  # noqa: SIM118
                missing.discard(key)
                if key not in readers:
                    stream.skip()
                    continue
                for number, entry in enumerate(stream.entries()):
                    try:
                        readers[key](entry)
                    except (KeyError, TypeError, OverflowError) as error:
                        raise UsageError(
                            f"{path}: entry {number} of {key!r} is not as COCO has it "
                            f"({reason(error)})"
                        ) from error
        if missing:
            raise UsageError(f"{path} has no {' and no '.join(sorted(missing))}; give a COCO file")

    def _image(self, entry: Any) -> None:
        self.images[entry["id"]] = _number(entry.get("width")), _number(entry.get("height"))

    def _annotation(self, entry: Any) -> None:
        self.owners.append(entry["image_id"])
        category, box = entry.get("category_id"), entry.get("bbox")
        self.categories.append(category if isinstance(category, int) else -1)
        self.boxes.extend(_four(box))

    def _category(self, entry: Any) -> None:
        self.names[entry["id"]] = entry["name"]


def _labelled(node: Any) -> Iterator[tuple[str, list[float]]]:
    """Iterate over the labelled nodes of a view hierarchy, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if "componentLabel" in node:
            yield str(node["componentLabel"]), _four(node.get("bounds"))
        stack.extend(reversed(node.get("children") or []))


def page_of(name: str, text: str) -> Entry:
    """Return the page of one layout's JSON, as `read_json` has it, or what is wrong with it."""
    try:
        record = from_json(text)
        width, height = record["canvas"]
        elements = []
        for element in record["elements"]:
            elements.append(Element(str(element["label"]), *_four(element.get("box"))))
        return Page(name, float(width), float(height), elements)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return BadEntry(name, "no readable layout", reason(error))


def _class_of(number: int, classes: Sequence[str]) -> str:
    return classes[number - 1] if 0 < number <= len(classes) else f"class {number}"


def _four(values: Any) -> list[float]:
    """Return four numbers, NaN for what is none."""
    whole = isinstance(values, list) and len(values) == 4
    return [*map(_number, values if whole else [None] * 4)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
