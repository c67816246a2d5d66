"""GenEval's rules by hand, and the metric on a detector that finds what the test says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image.benchmarks import geneval
from domains.text_to_image.benchmarks.boxes import Box, Found, apart, kept, overlap
from domains.text_to_image.benchmarks.geneval import COLORS, GenEvalHF, judged
from domains.text_to_image.networks.mask2former import Mask2Former, instances
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.images import to_image
from tests.domains.text_to_image.benchmarks.tiny_models import mask2former_folder
from tests.domains.text_to_image.rewards.published import clip_folder


def found(*boxes: Box, score: float = 0.99) -> list[Found]:
    return [Found(score, box) for box in boxes]


def square(x: float, y: float, half: float = 10) -> Box:
    return (x - half, y - half, x + half, y + half)


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


ONE, TWO, THREE = (found(*(square(30 * i, 50) for i in range(1, n + 1))) for n in (1, 2, 3))
SINGLE = {"include": [clause("cow")]}
PAIR = {"include": [clause("cow"), clause("dog")]}
COUNTING = {"include": [clause("cow", 2)], "exclude": [clause("cow", 3)]}
RED = {"include": [clause("cow", color="red")]}
BOTH = {"include": [clause("cow", color="red"), clause("dog", color="blue")]}
LEFT = {"include": [clause("cow"), clause("dog", position=["left of", 0])]}
LEFT_OF_RED = {"include": [clause("cow", color="red"), clause("dog", position=["left of", 0])]}
AT = {"cow": found(square(80, 50)), "dog": found(square(20, 50))}
CASES = [
    (SINGLE, {"cow": ONE}, {}, True),
    (SINGLE, {"cow": THREE, "dog": ONE}, {}, True),
    (SINGLE, {"dog": ONE}, {}, False),
    (PAIR, {"cow": ONE, "dog": ONE}, {}, True),
    (PAIR, {"cow": TWO}, {}, False),
    (COUNTING, {"cow": TWO}, {}, True),
    (COUNTING, {"cow": ONE}, {}, False),
    (COUNTING, {"cow": THREE}, {}, False),
    (RED, {"cow": ONE}, {"cow": "red"}, True),
    (RED, {"cow": ONE}, {"cow": "blue"}, False),
    (BOTH, {"cow": ONE, "dog": ONE}, {"cow": "red", "dog": "blue"}, True),
    (BOTH, {"cow": ONE, "dog": ONE}, {"cow": "blue", "dog": "red"}, False),
    (LEFT, AT, {}, True),
    (LEFT, {"cow": AT["dog"], "dog": AT["cow"]}, {}, False),
    # Only the surest dog counts, and it is on the right.
    (LEFT, {"cow": found(square(50, 50)), "dog": found(square(90, 50), square(5, 50))}, {}, False),
    # What the position refers to is there, but not as it was asked for.
    (LEFT_OF_RED, AT, {"cow": "blue"}, False),
    (LEFT_OF_RED, AT, {"cow": "red"}, True),
]


@pytest.mark.parametrize(("record", "objects", "colors", "right"), CASES)
def test_pictures_are_judged_as_by_hand(
    record: Any, objects: Any, colors: dict[str, str], right: bool
) -> None:
    assert judged(record, objects, lambda own, name: [colors[name]] * len(own)) is right


@pytest.mark.parametrize(
    ("a", "relations"),
    [
        (square(100, 50), {"right of"}),
        (square(0, 50), {"left of"}),
        (square(50, 0), {"above"}),
        (square(50, 100), {"below"}),
        # Offset (30, 30) less .1 (20 + 20) = (26, 26), over sqrt(1800): .61 each.
        (square(80, 80), {"right of", "below"}),
        # (30, 12) less 4: (26, 8) / 32.3 = (.80, .25).
        (square(80, 62), {"right of"}),
        # (5, 0) less 4 = (1, 0) / 5: .2, too near to tell.
        (square(55, 50), set()),
        # (8, 0) less 4 = (4, 0) / 8: exactly one half is not beyond it.
        (square(58, 50), set()),
        (square(50, 50), set()),
    ],
)
def test_relations_of_boxes(a: Box, relations: set[str]) -> None:
    assert apart(a, square(50, 50), 0.1) == relations


def test_overlap_of_boxes() -> None:
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9), pixel=1) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert overlap((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_which_objects_count() -> None:
    objects = [Found(s, square(50 + i, 50)) for i, s in enumerate((0.2, 0.95, 0.3, 0.5))]
    assert [one.score for one in kept(objects, 0.3, 16)] == [0.95, 0.5]
    assert [one.score for one in kept(objects, 0.9, 16)] == [0.95]
    assert [one.score for one in kept(objects, 0.1, 3)] == [0.95, 0.5, 0.3]
    assert [one.score for one in kept(objects, 0.1, 16, max_overlap=0.5)] == [0.95]


def test_instances_are_scored_as_mmdet_scores_them() -> None:
    """Two queries, two classes: class probability times the mean probability inside the mask."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    masks = torch.tensor([[[2.0, -1.0], [1.0, -1.0]], [[-1.0, -1.0], [-1.0, 4.0]]])
    scores, classes, inside = instances(logits, masks)
    likely = logits.double().softmax(-1)
    sure = [(torch.tensor([2.0, 1.0]).sigmoid().mean()), torch.tensor(4.0).sigmoid()]
    expected = {(q, c): float(likely[q, c] * sure[q]) for q in (0, 1) for c in (0, 1)}
    order = sorted(expected, key=lambda pair: -expected[pair])
    assert classes.tolist() == [c for _, c in order]
    assert scores.tolist() == pytest.approx([expected[pair] for pair in order], rel=1e-5)
    assert inside[0].tolist() == [[True, False], [True, False]]


_RGB = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}


class Colours(nn.Module):
    """Stands in for CLIP: mean colour, and the colour that a text names."""

    def __init__(self, pretrained: str) -> None:
        super().__init__()

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        self.seen = pictures
        return nn.functional.normalize(pictures.mean(dim=(2, 3)), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        named = [next(c for c in COLORS if c in text.replace("-", " ").split()) for text in texts]
        return torch.tensor([_RGB.get(name, [-1.0, -1, -1]) for name in named])


class Painted(nn.Module):
    """Stands in for a detector: red pixels are a cow, blue ones a dog."""

    classes = ("cow", "dog", "person", "dining table", "tv")

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masks = torch.stack([picture[0] > 0.9, picture[2] > 0.9])
        there = masks.any(dim=2).any(dim=1)
        return torch.tensor([0.95, 0.8])[there], torch.tensor([0, 1])[there], masks[there]


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> GenEvalHF:
    monkeypatch.setattr(geneval, "Mask2Former", Painted)
    monkeypatch.setattr(geneval, "CLIPEncoder", Colours)
    return GenEvalHF()


def picture(red: slice | None = None, blue: slice | None = None) -> Tensor:
    image = torch.full((3, 32, 48), 0.2)
    for channel, columns in ((0, red), (2, blue)):
        if columns is not None:
            image[:, 8:24, columns] = 0
            image[channel, 8:24, columns] = 1
    return image


def test_tasks_are_averaged_and_then_their_means(metric: GenEvalHF) -> None:
    """Two pictures of one task and three of another: .5 and 2/3, the whole 7/12, not 3/5."""
    records = [
        {"prompt": "a", "tag": "single_object", **SINGLE, "exclude": None},
        {"prompt": "b", "tag": "position", **LEFT, "exclude": None},
    ]
    condition = Condition(entries=records, tables={}, rows=torch.tensor([0, 0, 1, 1, 1]))
    right, left = slice(32, 44), slice(2, 14)
    pictures = [picture(red=left), picture(blue=left)]
    pictures += [picture(red=right, blue=left), picture(red=left, blue=right)]
    pictures += [picture(red=right, blue=left)]
    features = metric.features(torch.stack(pictures), condition)
    assert features["score"].tolist() == [1, 0, 1, 0, 1]
    expected = {"GenEvalHF": 7 / 12, "GenEvalHF/position": 2 / 3, "GenEvalHF/single_object": 0.5}
    assert metric.compare(features) == pytest.approx(expected)
    errors = metric.errors(features)
    position = torch.tensor([1.0, 0, 1]).std().item() / 3**0.5
    assert errors["GenEvalHF/position"] == pytest.approx(position)
    assert errors["GenEvalHF"] == pytest.approx(math.hypot(position, 0.5) / 2)
    same = metric.errors(features, features)
    assert list(same.values()) == pytest.approx([0, 0, 0])


def test_counting_has_its_own_threshold(metric: GenEvalHF) -> None:
    """The detector is .8 sure of dogs: enough to be there, too little to be counted."""
    one = {"include": [clause("dog")], "exclude": [clause("dog", 2)], "prompt": "a"}
    records = [one | {"tag": "single_object"}, one | {"tag": "counting"}]
    condition = Condition(entries=records, tables={}, rows=torch.tensor([0, 1]))
    pictures = picture(blue=slice(4, 20)).expand(2, -1, -1, -1)
    assert metric.scores(pictures, condition).tolist() == [1, 0]


def test_colours_are_told_by_the_object_on_grey(metric: GenEvalHF) -> None:
    image = picture(red=slice(4, 20))
    (cow,) = metric.found(image, {"cow"})["cow"]
    assert cow.box == (4, 8, 20, 24) and cow.score == pytest.approx(0.95)
    assert metric.color(image, cow, "cow") == "red"
    assert metric.encoder.seen.shape == (1, 3, 16, 16)
    hole = Found(cow.score, (2, 8, 20, 24), cow.mask)
    metric.color(image, hole, "cow")
    assert metric.encoder.seen[0, :, :, :2].unique().tolist() == pytest.approx([0.6])


def test_prompts_of_other_data_are_refused(metric: GenEvalHF) -> None:
    condition = Condition(entries=[{"prompt": "a cow"}], tables={}, rows=torch.tensor([0]))
    with pytest.raises(UsageError, match=r"needs 'tag' and 'include'.*set data to GenEvalPrompts"):
        metric.features(picture()[None], condition)
    entry = {"prompt": "a", "tag": "colors", "include": [clause("griffin")]}
    condition = Condition(entries=[entry], tables={}, rows=torch.tensor([0]))
    with pytest.raises(UsageError, match="does not know 'griffin'"):
        metric.features(picture()[None], condition)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask2former_folder(tmp_path_factory.mktemp("mask2former"))


def test_a_real_mask2former_finds_what_transformers_finds(folder: Path) -> None:
    """Beside transformers' own masks: those of its most probable queries, at our size."""
    network = Mask2Former(str(folder), torch.float32)
    assert {"dining table", "tv", "computer mouse", "tv remote"} <= {*network.classes}
    image = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    scores, classes, masks = network(image)
    assert masks.shape[1:] == (40, 56) and (scores[:-1] >= scores[1:]).all()
    assert masks.any(dim=2).any(dim=1).all() and (classes < 80).all()
    read = network.processor(images=[to_image(image)], return_tensors="pt")
    with torch.no_grad():
        out = network.model(**read)
    theirs = network.processor.post_process_instance_segmentation(out, threshold=0.0)[0]
    segments = theirs["segments_info"]
    assert segments
    ours = torch.stack([classes.float(), scores], dim=1)
    # Theirs are taken of masks at another size, and rounded.
    for one in segments:
        beside = torch.tensor([one["label_id"], one["score"]])
        assert ((ours - beside).abs() < torch.tensor([0.5, 1e-3])).all(dim=1).any()


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    clip = clip_folder(tmp_path / "clip")
    with pytest.raises(UsageError, match=r"detector: .* could not be loaded as a Mask2Former"):
        GenEvalHF(str(clip), str(clip))
    other = mask2former_folder(tmp_path / "other", ["wall", "floor"])
    with pytest.raises(UsageError, match=r"must know COCO's classes, but .* knows wall, floor"):
        GenEvalHF(str(other), str(clip))
    with pytest.raises(UsageError, match=r"counting_threshold must be in \[0, 1\], got 9"):
        GenEvalHF(str(folder), str(clip), counting_threshold=9)
