"""Layout files: real ones, written ones, broken ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.layout.page.classes import CLASS_LISTS, class_list, color_of
from domains.layout.samples import EMPTY
from domains.layout.sources import JSONLayouts, PubLayNet, RicoArrays, RicoJSON, Source
from domains.layout.sources.formats import read_arrays, read_coco, read_json, read_rico
from domains.layout.sources.packed import Element, Page, elements_of, pack, reading_order
from domains.layout.sources.streaming import JSONStream
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry, Report

LAYOUTS = Path(__file__).parents[4] / ".." / "shared/data/layouts"
NAMES = ("text", "title", "list", "table", "figure")
CATEGORIES = [{"id": 10 * i, "name": name} for i, name in enumerate(NAMES, 1)]
BOX = [10.0, 20.0, 30.0, 40.0]


def real(name: str) -> Path:
    if not (LAYOUTS / name).is_file():
        pytest.skip(f"{name} is not here")
    return LAYOUTS / name


def coco(path: Path, annotations: list[Any], images: Any = None, **more: Any) -> Path:
    images = images or [{"id": i, "width": 100, "height": 200} for i in (7, 3)]
    content = {"info": {"a": [1, 2]}, "images": images, "annotations": annotations, **more}
    path.write_text(json.dumps({"categories": CATEGORIES, **content}))
    return path


def annotation(image: int = 7, box: Any = BOX, category: Any = 10) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "bbox": box, "category_id": category, "segmentation": [[]]}


def arrays(path: Path, **changes: Any) -> Path:
    label = np.zeros((2, 3), np.uint8)
    label[0, :2], label[1, 0] = (1, 2), 3
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[label > 0] = (0.25, 0.5, 0.25, 0.125)
    content = {"bbox_ltwh": boxes, "label": label, "classes": np.array(["<pad>", *NAMES])}
    np.savez(path, **{**content, **changes})
    return path


def settings(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache")}


def test_real_publaynet_pages_load(tmp_path: Path) -> None:
    path = real("publaynet_20pages_coco.json")
    source = PubLayNet(str(path), max_elements=30, strict=True, **settings(tmp_path))
    packed = source.load()
    record = json.loads(path.read_text())
    assert len(packed) == 20 and (packed.labels != EMPTY).sum() == 193
    # Page by page, box by box, against the file itself.
    names = {c["id"]: c["name"] for c in record["categories"]}
    for i, image in enumerate(record["images"]):
        size = np.array([image["width"], image["height"]] * 2)
        wanted = sorted(
            (names[a["category_id"]], *(np.array(a["bbox"]) / size).round(4))
            for a in record["annotations"]
            if a["image_id"] == image["id"]
        )
        found = sorted(
            (e.label, *np.round((e.left, e.top, e.width, e.height), 4))
            for e in elements_of(packed.boxes[i], packed.labels[i], source.classes)
        )
        assert [row[0] for row in found] == [row[0] for row in wanted]
        np.testing.assert_allclose(
            [row[1:] for row in found], [row[1:] for row in wanted], atol=2e-3
        )
    assert len(PubLayNet(str(path), max_elements=9, **settings(tmp_path)).load()) == 12


def test_real_rico_arrays_load(tmp_path: Path) -> None:
    path = real("rico25_max20_val.npz")
    packed = RicoArrays(str(path), leave_out="layouts", **settings(tmp_path)).load()
    with np.load(path) as file:
        boxes, labels, names = file["bbox_ltwh"], file["label"], file["classes"]
        canvases = file["canvas_wh"]
    assert tuple(map(str, names[1:])) == CLASS_LISTS["rico"]
    # Screens with boxes of no size can be left out; all others are there, in order.
    sound = ((boxes[..., 2:] > 0).all(-1) | (labels == 0)).all(-1)
    assert len(packed) == sound.sum() > 1800
    np.testing.assert_array_equal(packed.canvases, canvases[sound])
    ours = np.sort(np.where(packed.labels == EMPTY, 0, packed.labels + 1), axis=1)
    np.testing.assert_array_equal(ours, np.sort(labels[sound].astype(np.int8), axis=1))
    areas = (packed.boxes[..., 2] * packed.boxes[..., 3]).sum(axis=1)
    truth = (boxes[..., 2] * boxes[..., 3] * (labels > 0)).sum(axis=1)[sound]
    np.testing.assert_allclose(areas, truth, atol=1e-3)
    # By default such a box alone is; a screen without any other box has nothing left.
    whole = RicoArrays(str(path), **settings(tmp_path)).load()
    full = (labels > 0) & (boxes[..., 2:] > 0).all(-1)
    assert (whole.labels != EMPTY).sum() == full.sum() and len(whole) == full.any(1).sum()


def test_coco_pages_keep_the_files_order_and_each_its_own_boxes(tmp_path: Path) -> None:
    boxes = [annotation(3, [0, 0, 50, 20], 20), annotation(7), annotation(3, [0, 50, 50, 50], 50)]
    first, second = read_coco(coco(tmp_path / "a.json", boxes))
    assert first == Page("image 7", 100, 200, [Element("text", *BOX)])
    assert isinstance(second, Page) and [e.label for e in second.elements] == ["title", "figure"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("indent", [None, 3])
def test_streams_read_what_json_reads(tmp_path: Path, chunk: int, indent: int | None) -> None:
    content = {
        "a": [1, 23, -4.5e3, "}],{", {"b": [[], {}]}, None, True],
        "empty": [],
        "skipped": {"deep": [1, {"x": "]"}]},
        "ü": [12345678],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    found: dict[str, Any] = {}
    with JSONStream(path, chunk) as stream:
        for key in stream.keys():  # noqa: SIM118
            if key == "skipped":
                stream.skip()
            else:
                found[key] = list(stream.entries())
    del content["skipped"]
    assert found == content


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8, 0.99])
def test_a_coco_file_cut_off_is_refused_wherever_it_ends(tmp_path: Path, share: float) -> None:
    path = coco(tmp_path / "a.json", [annotation()] * 200)
    text = path.read_text()
    path.write_text(text[: round(share * len(text))])
    with pytest.raises(UsageError, match=rf"{re.escape(str(path))} is cut off") as raised:
        list(read_coco(path))
    assert "\n" not in str(raised.value) and "none is used" in str(raised.value)


def test_a_file_that_is_no_coco_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, message in [
        ("[1, 2]", "is a list, not a COCO file"),
        ("<html>", "is a text or number, not a COCO file"),
        ('{"images": []}', "no annotations and no categories"),
        ('{"images": [{"width": 1}], "annotations": []}', "entry 0 of 'images'.*no 'id'"),
        ('{"annotations": [{"bbox": [1]}]}', "entry 0 of 'annotations'.*no 'image_id'"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            list(read_coco(path))
    with pytest.raises(UsageError, match="there is no file"):
        list(read_coco(tmp_path / "missing.json"))


BAD_ANNOTATIONS = {
    "a class that is not in the list": annotation(category=99),
    "a box that is not finite": annotation(box=[1.0, float("nan"), 3.0, 4.0]),
    "an empty box": annotation(box=[1.0, 2.0, 0.0, 4.0]),
    "a box outside the canvas": annotation(box=[80.0, 2.0, 30.0, 4.0]),
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_bad_annotations_stop_or_are_left_out_and_counted(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BAD_ANNOTATIONS[kind]
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7), bad, annotation(3)])
    sentence = rf"a\.json: image 7 has {kind} \(element 1: "
    with pytest.raises(UsageError, match=sentence) as raised:
        PubLayNet(str(path), strict=True, **settings(tmp_path)).load()
    assert "\n" not in str(raised.value)
    source = PubLayNet(str(path), leave_out="layouts", **settings(tmp_path))
    assert len(source.load()) == 1
    (report,) = (tmp_path / "cache").glob("*/report.txt")
    assert re.search(
        rf"1 of 2 layouts used; 1 left out with {kind} \(image 7\)", report.read_text()
    )


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_a_bad_element_costs_itself_by_default(tmp_path: Path, kind: str) -> None:
    """As in the code of LayoutGAN++ and LayoutDM; more elements than slots are then others."""
    bad = BAD_ANNOTATIONS[kind]
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7), bad, annotation(3)])
    source = PubLayNet(str(path), max_elements=2, **settings(tmp_path))
    assert (source.load().labels != EMPTY).sum(axis=1).tolist() == [1, 2]
    (report,) = (tmp_path / "cache").glob("*/report.txt")
    assert f"2 of 2 layouts used; 1 part of these left out with {kind} (image 7)" in (
        report.read_text()
    )
    assert re.search(rf"image 7 has {kind} \(element 1: ", source.left_out())
    alone = coco(tmp_path / "b.json", [annotation(3), bad])
    assert len(PubLayNet(str(alone), **settings(tmp_path)).load()) == 1
    with pytest.raises(UsageError, match="leave_out is 'pages'"):
        PubLayNet(str(path), leave_out="pages", **settings(tmp_path))  # type: ignore[arg-type]


def test_nothing_left_says_why_names_the_key_and_keeps_the_list(tmp_path: Path) -> None:
    """Class names of another case, as DocLayNet has them; pages without elements besides."""
    names = [{"id": 10, "name": "Text"}, {"id": 20, "name": "Title"}]
    images = [{"id": i, "width": 100, "height": 200} for i in range(9)]
    boxes = [annotation(0), annotation(0, category=20), annotation(1)]
    path = coco(tmp_path / "a.json", boxes, images, categories=names)
    source = PubLayNet(str(path), **settings(tmp_path))
    with pytest.raises(UsageError, match=r"2 left out with a class that is not in the list") as e:
        source.load()
    sentence = str(e.value)
    assert "(image 0: element 0: Text at [10.0, 20.0, 30.0, 40.0], image 1)" in sentence
    assert "set classes to the file's own names, such as ['Text', 'Title']" in sentence
    assert "7 left out with no elements (image 2, image 3" in sentence and "\n" not in sentence
    (listing,) = (tmp_path / "cache").iterdir()
    assert str(listing) in sentence and len(listing.read_text().splitlines()) == 9
    assert source.left_out() == listing.read_text()
    assert len(PubLayNet(str(path), classes=["Text", "Title"], **settings(tmp_path)).load()) == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_files_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7)])
    mark = "\ufeff" if encoding.endswith("be") else ""
    text = mark + path.read_text()
    path.write_bytes(text.encode(encoding))
    assert len(PubLayNet(str(path), **settings(tmp_path)).load()) == 2
    line = json.dumps({"canvas": [100, 200], "elements": [{"label": "text", "box": BOX}]})
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(f"{mark}{line}\r\n{line}\r\n".encode(encoding))
    assert len(JSONLayouts(str(lines), **settings(tmp_path)).load()) == 2
    path.write_bytes(text.lstrip("\ufeff").replace("text", "t\u00ebxt").encode("latin-1"))
    with pytest.raises(UsageError, match="cannot be read as text"):
        PubLayNet(str(path), **settings(tmp_path)).load()


@pytest.mark.parametrize(
    "changes",
    [
        {"canvas_wh": np.array([[0, 5], [np.nan, 2]])},
        {"canvas_wh": np.ones((7, 2))},
        {"name": np.array(["only one"])},
    ],
)
def test_arrays_that_no_model_sees_cost_no_layout(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = RicoArrays(
        str(arrays(tmp_path / "a.npz", **changes)), 3, NAMES, strict=True, **settings(tmp_path)
    )
    assert len(source.load()) == 2
    with pytest.raises(UsageError, match=r"label \(3,\); they must be"):
        list(read_arrays(arrays(tmp_path / "b.npz", label=np.ones(3)), NAMES))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bbox": [1, 2, 3]}, "a box that is not finite"),
        ({"bbox": ["a", 1, 2, 3]}, "a box that is not finite"),
        ({"bbox": None}, "a box that is not finite"),
        ({"category_id": None}, "a class that is not in the list"),
        ({"image_id": 5}, "annotations but no entry among the images"),
    ],
)
def test_annotations_that_lack_something_spoil_their_page_alone(
    tmp_path: Path, change: dict[str, Any], kind: str
) -> None:
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7), {**annotation(7), **change}])
    packed, report = pack(read_coco(path), NAMES, 4, source="a")
    assert [bad.kind for bad in report.faults] == [kind]
    assert len(packed) == (2 if "image_id" in change else 1)


@pytest.mark.parametrize(("width", "height"), [(0, 200), (100, -1), (None, 5), (float("nan"), 5)])
def test_a_canvas_without_a_size_is_a_fault(tmp_path: Path, width: Any, height: Any) -> None:
    images = [{"id": 7, "width": width, "height": height}, {"id": 3, "width": 100, "height": 200}]
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7)], images)
    packed, report = pack(read_coco(path), NAMES, 4, source="a")
    assert len(packed) == 1 and [bad.kind for bad in report.faults] == ["a canvas without a size"]


def test_more_elements_than_slots_is_a_fault(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [annotation(3)] * 2 + [annotation(7)])
    with pytest.raises(UsageError, match=r"image 3 has more elements than the 1 slots \(2 elem"):
        PubLayNet(str(path), max_elements=1, strict=True, **settings(tmp_path)).load()
    assert len(PubLayNet(str(path), max_elements=1, **settings(tmp_path)).load()) == 1


def test_nothing_left_is_an_error_in_both_modes(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [annotation(7, category=99), annotation(3, [0, 0, 0, 0])])
    with pytest.raises(UsageError, match=r"0 of 2 layouts used.*nothing is left"):
        PubLayNet(str(path), **settings(tmp_path)).load()


def test_rounding_at_the_edge_is_no_fault(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [annotation(7, [-0.1, 0, 100.2, 200.3]), annotation(3)])
    packed = PubLayNet(str(path), strict=True, **settings(tmp_path)).load()
    np.testing.assert_array_equal(packed.boxes[0, 0], [0.5, 0.5, 1, 1])


def hierarchy(bounds: list[int], **more: Any) -> dict[str, Any]:
    return {"bounds": bounds, "class": "x", **more}


def test_rico_elements_are_the_labelled_nodes(tmp_path: Path) -> None:
    leaf = hierarchy([100, 200, 300, 260], componentLabel="Text")
    inner = hierarchy([100, 200, 700, 900], componentLabel="Card", children=[leaf, None])
    root = hierarchy([0, 0, 1440, 2560], children=[hierarchy([0, 0, 9, 9]), inner])
    (tmp_path / "7.json").write_text(json.dumps(root))
    (tmp_path / "12.json").write_text(json.dumps({**root, "bounds": [0, 0, 2560, 1440]}))
    (tmp_path / "13.json").write_text(json.dumps(root)[:60])
    (tmp_path / "14.json").write_text(json.dumps({**root, "bounds": None}))
    page, landscape, *broken = read_rico(tmp_path)
    boxes = [Element("Card", 100, 200, 600, 700), Element("Text", 100, 200, 200, 60)]
    assert page == Page("7.json", 1440, 2560, boxes)
    assert isinstance(landscape, BadEntry) and landscape.kind == "a landscape canvas"
    assert [isinstance(bad, BadEntry) and bad.name for bad in broken] == ["13.json", "14.json"]
    cache = tmp_path / "cache"
    packed = RicoJSON(str(tmp_path), cache_dir=str(cache)).load()
    assert len(packed) == 1 and packed.canvases.tolist() == [[1440, 2560]]
    with pytest.raises(UsageError, match=r"12\.json has a landscape canvas"):
        RicoJSON(str(tmp_path), strict=True, cache_dir=str(cache)).load()
    (tmp_path / "nothing").mkdir()
    for path, message in (
        (tmp_path / "7.json", "is no folder"),
        (tmp_path / "nothing", "no .json"),
    ):
        with pytest.raises(UsageError, match=message):
            list(read_rico(path))


def test_arrays_are_checked(tmp_path: Path) -> None:
    first, second = read_arrays(arrays(tmp_path / "a.npz"), NAMES)
    assert isinstance(first, Page) and isinstance(second, Page)
    assert first.elements == [Element(n, 0.25, 0.5, 0.25, 0.125) for n in ("text", "title")]
    assert [e.label for e in second.elements] == ["list"]
    with pytest.raises(UsageError, match=r"has the classes \['text'.*set classes"):
        list(read_arrays(tmp_path / "a.npz", CLASS_LISTS["rico"]))
    label = np.full((2, 3), 9, np.uint8)
    unnamed = arrays(tmp_path / "b.npz", label=label, classes=np.array([]))
    _, report = pack_all(lambda: read_arrays(unnamed, NAMES))
    assert {bad.kind for bad in report.faults} == {"a class that is not in the list"}
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    np.savez(tmp_path / "d.npz", label=label)
    for name, message in (("c.npz", "is no .npz file"), ("d.npz", "no 'bbox_ltwh")):
        with pytest.raises(UsageError, match=message):
            list(read_arrays(tmp_path / name, NAMES))


def pack_all(read: Callable[[], Any]) -> tuple[int, Report]:
    """Pack what can be packed, with one good page more so that something can."""
    good = Page("good", 1, 1, [Element("text", 0, 0, 1, 1)])
    packed, report = pack([good, *read()], NAMES, 4, source="a")
    return len(packed), report


def test_json_lines_and_folders(tmp_path: Path) -> None:
    record = {"canvas": [100, 200], "elements": [{"label": "text", "box": BOX}]}
    line = json.dumps(record)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([line, "", line[: len(line) // 2], '{"canvas": [1, 2]}', line]))
    found = list(read_json(path))
    assert found[0] == Page("line 1", 100, 200, [Element("text", *BOX)]) and found[3] == Page(
        "line 5", 100, 200, [Element("text", *BOX)]
    )
    assert [str(bad).split(" (")[0] for bad in found[1:3]] == [
        f"line {i} has no readable layout" for i in (3, 4)
    ]
    with pytest.raises(UsageError, match="line 3 has no readable layout"):
        JSONLayouts(str(path), strict=True, **settings(tmp_path)).load()
    assert len(JSONLayouts(str(path), **settings(tmp_path)).load()) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"holds no \.json files"):
        list(read_json(folder))
    (folder / "b.json").write_text(json.dumps(record, indent=1))
    (folder / "._b.json").write_bytes(b"\x00\x05\x16\x07Mac OS X")  # macOS keeps notes there
    assert list(read_json(folder)) == [Page("b.json", 100, 200, [Element("text", *BOX)])]


def test_arrays_are_cached_until_file_or_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = coco(tmp_path / "a.json", [annotation(3), annotation(7)])
    source = PubLayNet(str(path), **settings(tmp_path))
    first = source.load()
    assert isinstance(first.boxes, np.memmap)

    def refuse(path: Path) -> Any:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("domains.layout.sources.files.read_coco", refuse)
        np.testing.assert_array_equal(source.load().boxes, first.boxes)
        with pytest.raises(AssertionError, match="read again"):
            PubLayNet(str(path), max_elements=3, **settings(tmp_path)).load()
    coco(path, [annotation(3), annotation(7), annotation(7)])
    assert (source.load().labels != EMPTY).sum() == 3
    assert not list((tmp_path / "cache").glob(".partial*"))


def test_sources_say_what_is_wrong_with_their_settings(tmp_path: Path) -> None:
    makers: list[tuple[Callable[[], Source], str]] = [
        (lambda: PubLayNet("a.json", max_elements=0), "max_elements must be at least 1"),
        (lambda: PubLayNet("a.json", classes="coco"), "'coco' is unknown"),
        (lambda: JSONLayouts("a.json", classes=["a", "a"]), "all different"),
    ]
    for make, message in makers:
        with pytest.raises(UsageError, match=message):
            make()
    with pytest.raises(UsageError, match=r"there is no .*missing"):
        PubLayNet(str(tmp_path / "missing"), **settings(tmp_path)).load()


def test_reading_order_goes_down_columns_between_wide_boxes() -> None:
    boxes = np.array(
        [
            [0.52, 0.30, 0.9, 0.6],  # right column
            [0.1, 0.62, 0.9, 0.7],  # wide, below both
            [0.1, 0.45, 0.48, 0.6],  # left column, lower
            [0.1, 0.75, 0.48, 0.9],  # left column below the wide one
            [0.1, 0.1, 0.9, 0.2],  # wide, at the top
            [0.13, 0.25, 0.48, 0.4],  # left column, indented
        ]
    )
    assert reading_order(boxes) == [4, 5, 2, 0, 1, 3]
    shuffled = np.random.default_rng(0).permutation(6)
    assert [shuffled[i] for i in reading_order(boxes[shuffled])] == [4, 5, 2, 0, 1, 3]


def test_class_lists_and_colours() -> None:
    assert class_list("publaynet") == NAMES and len(class_list("rico")) == 25
    assert class_list(["a", "b"]) == ("a", "b")
    for names in CLASS_LISTS.values():
        colors = {color_of(i, names) for i in range(len(names))}
        assert len(colors) == len(names)
        assert all(0 <= part <= 255 for color in colors for part in color)
