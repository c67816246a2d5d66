"""GenEval's rules by hand, its aggregation, and a whole evaluation on a tiny real detector."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image.benchmarks import Detector, Found, GenEval, Mask2Former
from domains.text_to_image.benchmarks.geneval import TASKS, is_correct, relations
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from tests.domains.text_to_image.benchmarks.tiny import mask2former_folder

FILE = Path(__file__).parents[4] / ".." / "shared" / "data" / "prompts" / "geneval_metadata.jsonl"


def found(*boxes: tuple[float, float, float, float], score: float = 0.95) -> list[Found]:
    return [Found(score, box) for box in boxes]


LEFT, RIGHT, LOW = (0.0, 10.0, 20.0, 30.0), (60.0, 10.0, 90.0, 30.0), (0.0, 70.0, 20.0, 95.0)


def wish(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (LEFT, LOW, {"above"}),
        (LOW, LEFT, {"below"}),
        (LEFT, LEFT, set()),
        # Centres 5 apart, a tenth of the summed widths is 6: no direction.
        ((0.0, 0.0, 30.0, 10.0), (5.0, 0.0, 35.0, 10.0), set()),
        # 55 to the left and 62.5 up, less a tenth of 50 and of 45: both are more than half.
        (LEFT, (50.0, 70.0, 80.0, 95.0), {"left of", "above"}),
    ],
)
def test_relations(a: Sequence[float], b: Sequence[float], names: set[str]) -> None:
    assert relations(a, b) == names


@pytest.mark.parametrize(
    ("include", "exclude", "objects", "right"),
    [
        ([wish("dog")], [], {"dog": found(LEFT)}, True),
        ([wish("dog")], [], {"dog": []}, False),
        ([wish("dog"), wish("bench")], [], {"dog": found(LEFT)}, False),
        ([wish("dog"), wish("bench")], [], {"dog": found(LEFT), "bench": found(LOW)}, True),
        ([wish("dog", 2)], [wish("dog", 3)], {"dog": found(LEFT, LOW)}, True),
        ([wish("dog", 2)], [wish("dog", 3)], {"dog": found(LEFT, LOW, RIGHT)}, False),
        ([wish("dog", 2)], [wish("dog", 3)], {"dog": found(LEFT)}, False),
        ([wish("dog", color="red")], [], {"dog": found(LEFT)}, True),
        ([wish("dog", color="blue")], [], {"dog": found(LEFT)}, False),
        ([wish("dog", 2, color="red")], [], {"dog": found(LEFT, LOW)}, True),
        (
            [wish("dog"), wish("bench", position=["right of", 0])],
            [],
            {"dog": found(LEFT), "bench": found(RIGHT)},
            True,
        ),
        (
            [wish("dog"), wish("bench", position=["left of", 0])],
            [],
            {"dog": found(LEFT), "bench": found(RIGHT)},
            False,
        ),
        # Without the first object there is nothing to be right of.
        ([wish("dog"), wish("bench", position=["right of", 0])], [], {"bench": found(LOW)}, False),
    ],
)
def test_rules(
    include: list[Any], exclude: list[Any], objects: dict[str, list[Found]], right: bool
) -> None:
    record = {"include": include, "exclude": exclude}
    assert is_correct(record, objects, lambda name, some: ["red"] * len(some)) == right


class Scripted(Detector):
    """Returns what it was told."""

    def __init__(self, answers: list[dict[str, list[Found]]]) -> None:
        super().__init__()
        self.answers, self.asked = list(answers), list[Any]()

    def find(
        self, pictures: Tensor, names: Sequence[Sequence[str]], threshold: float
    ) -> list[dict[str, list[Found]]]:
        self.asked += [*names]
        return [
            {name: answer.get(name, []) for name in own}
            for answer, own in zip(self.answers, names, strict=True)
        ]


def condition(*records: dict[str, Any]) -> Condition:
    entries = [{"prompt": "a photo", "exclude": None, **record} for record in records]
    return Condition(entries=entries, tables={}, rows=torch.arange(len(entries)))


def test_aggregation_is_the_mean_of_the_tasks() -> None:
    records = [{"tag": tag, "include": [wish("dog")]} for tag in ("counting", *["position"] * 3)]
    sure, unsure = {"dog": found(LEFT)}, {"dog": found(LEFT, score=0.8)}
    metric = GenEval(Scripted([unsure, sure, unsure, {}]), clip="shapes_clip")
    features = metric.features(torch.rand(4, 3, 32, 32), condition(*records))
    values = metric.compare(features)
    # Counting needs a score of 0.9. Of position two of three are right.
    assert values["geneval_hf/counting"] == 0
    assert values["geneval_hf/position"] == pytest.approx(2 / 3)
    assert values["geneval_hf"] == pytest.approx(1 / 3)
    assert set(values) == {"geneval_hf", "geneval_hf/counting", "geneval_hf/position"}


def test_errors_are_those_of_a_mean_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(6).repeat(40)
    draws = []
    for _ in range(400):
        right = (torch.rand(240, generator=generator) < 0.3 + 0.1 * task).double()
        draws.append({"task": task, "right": right})
    metric = GenEval(Scripted([]), clip="shapes_clip")
    values = torch.tensor([metric.compare(draw)["geneval_hf"] for draw in draws])
    errors = [metric.errors(draw)["geneval_hf"] for draw in draws]
    assert sum(errors) / len(errors) == pytest.approx(float(values.std()), rel=0.1)
    paired = metric.errors(draws[0], draws[1])
    alone = [metric.errors(draw)["geneval_hf"] for draw in draws[:2]]
    assert paired["geneval_hf"] == pytest.approx(sum(e**2 for e in alone) ** 0.5, rel=0.2)
    assert metric.errors(draws[0], draws[0])["geneval_hf"] == 0


def test_names_that_differ_from_cocos_are_translated() -> None:
    detector = Scripted([{"mouse": found(LEFT)}])
    metric = GenEval(detector, clip="shapes_clip")
    record = {"tag": "single_object", "include": [wish("computer mouse")]}
    features = metric.features(torch.rand(1, 3, 32, 32), condition(record))
    assert detector.asked == [["mouse"]] and features["right"].tolist() == [1]


class MeanColour(nn.Module):
    """Stands in for CLIP: the mean colour of a picture, and that of a colour's name."""

    RGB: ClassVar = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        named = [next((v for c, v in self.RGB.items() if c in t), (-1, -1, -1)) for t in texts]
        return nn.functional.normalize(torch.tensor(named).float(), dim=-1)

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return nn.functional.normalize(pictures.mean(dim=(2, 3)), dim=-1)


def test_colours_are_told_by_clip_on_the_object_alone() -> None:
    metric = GenEval(Scripted([]), clip="shapes_clip")
    metric.encoder = MeanColour()
    picture = torch.zeros(3, 64, 64)
    picture[1] = 1  # green all around
    square = torch.zeros(64, 64, dtype=torch.bool)
    square[8:40, 8:40] = True
    picture[:, square] = torch.tensor([1.0, 0, 0])[:, None]
    whole = (0, 0, 64, 64)
    assert metric.colour(picture, Found(1, (8, 8, 40, 40)), "square") == "red"
    assert metric.colour(picture, Found(1, whole), "square") == "green"
    # Behind grey the rest does not count: the mean is redder than grey.
    assert metric.colour(picture, Found(1, whole, square), "square") != "green"
    assert "a photo of a red-colored square" in metric.encoder.texts
    assert "a photo of a white object" in metric.encoder.texts


def test_a_tiny_mask2former_finds_masks_and_boxes(tmp_path: Path) -> None:
    detector = Mask2Former(str(mask2former_folder(tmp_path)))
    pictures = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    seen, other = detector.find(pictures, [["dog", "clock"], ["person"]], 0.0)
    assert set(seen) == {"dog", "clock"} and set(other) == {"person"}
    for one in (one for own in (*seen.values(), *other.values()) for one in own):
        assert one.mask is not None and one.mask.shape == (48, 64) and 0 < one.score < 1
        left, top, right, bottom = map(int, one.box)
        inside = one.mask[top:bottom, left:right]
        assert one.mask.sum() == inside.sum() and inside.any(dim=0)[[0, -1]].all()
    scores = [one.score for one in seen["dog"]]
    assert scores == sorted(scores, reverse=True) and scores
    with pytest.raises(ValueError, match="no 'zebra'"):
        detector.find(pictures, [["zebra"], []], 0.0)
    metric = GenEval(detector, clip="shapes_clip")
    record = {"tag": "single_object", "include": [wish("zebra")]}
    with pytest.raises(UsageError, match="zebra"):
        metric.features(pictures[:1], condition(record))


@pytest.mark.parametrize("record", [{"tag": "size", "include": []}, {"tag": "counting"}])
def test_other_records_are_told(record: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"evaluation_metadata\.jsonl"):
        GenEval(Scripted([]), clip="shapes_clip").features(
            torch.rand(1, 3, 8, 8), condition(record)
        )


def test_all_published_records_are_understood() -> None:
    if not FILE.is_file():
        pytest.skip("the published prompts are not here")
    records = [json.loads(line) for line in FILE.read_text().splitlines()]
    metric = GenEval(Scripted([{}] * len(records)), clip="shapes_clip", batch_size=1000)
    features = metric.features(torch.zeros(len(records), 3, 8, 8), condition(*records))
    assert features["right"].sum() == 0
    counts = torch.bincount(features["task"]).tolist()
    assert dict(zip(TASKS, counts, strict=True)) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
        "color_attr": 100,
    }  # fmt: skip
