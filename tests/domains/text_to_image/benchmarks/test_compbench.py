"""T2I-CompBench++: phrases of the published prompts, scores by hand, the real classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image.benchmarks import T2ICompBench, compbench
from domains.text_to_image.benchmarks.boxes import Box, Found
from domains.text_to_image.benchmarks.phrases import noun_phrases, singular
from domains.text_to_image.benchmarks.placing import (
    alone,
    number_score,
    place_score,
    placed_of,
    wanted_numbers,
)
from domains.text_to_image.networks.blip_vqa import BlipVQA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from tests.domains.text_to_image.benchmarks.tiny_models import benchmark_models

PUBLISHED = Path(__file__).parents[4] / ".." / "shared" / "data" / "prompts"
needs_files = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
PAIR = re.compile(r"an? [^.,]* and an? [^.,]*\.?")


def published(category: str) -> list[str]:
    path = PUBLISHED / f"t2i_compbench_{category}_val.txt"
    return [line.strip() for line in path.read_text().split("\n") if line.strip()]


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a brown bear and a white sink", ["a brown bear", "a white sink"]),
        ("rubber gloves and a plastic cup", ["rubber gloves", "a plastic cup"]),
        ("two black sheep, a goat in a field", ["two black sheep", "a goat", "a field"]),
        ("A black and white cat sits in a sink.", ["A black and white cat", "a sink"]),
        (
            "The smooth, white statue stood in front of the rough wall.",
            ["The smooth, white statue", "front", "the rough wall"],
        ),
        (
            "The metallic stand and wooden tray hold the cups by the door.",
            ["The metallic stand", "wooden tray", "the cups", "the door"],
        ),
        (
            "The bright green grass contrasted with the dull grey building.",
            ["The bright green grass", "the dull grey building"],
        ),
    ],
)
def test_noun_phrases(prompt: str, phrases: list[str]) -> None:
    assert noun_phrases(prompt) == phrases


@needs_files
@pytest.mark.parametrize(("category", "num"), [("color", 237), ("shape", 240), ("texture", 197)])
def test_pairs_of_the_published_prompts_are_parted_at_and(category: str, num: int) -> None:
    """All but those with "of", where spaCy has two phrases too."""
    pairs = [prompt for prompt in published(category) if PAIR.fullmatch(prompt)]
    assert len(pairs) == num
    plain = [prompt for prompt in pairs if " of " not in prompt]
    assert len(plain) > 0.9 * num
    wrong = [p for p in plain if noun_phrases(p) != re.split(" and (?=an? )", p.rstrip("."))]
    assert not wrong


@needs_files
def test_all_published_prompts_can_be_asked() -> None:
    for category in ("color", "shape", "texture", "complex"):
        assert all(noun_phrases(prompt) for prompt in published(category))
    for category in ("spatial", "3d_spatial"):
        assert all(placed_of(prompt) for prompt in published(category))
    number = re.compile(r"\b(an?|one|two|three|four|five|six|seven|eight)\b")
    for prompt in published("numeracy"):
        assert len(wanted_numbers(prompt)) == len(number.findall(prompt)), prompt


@pytest.mark.parametrize(
    ("prompt", "placed"),
    [
        ("a girl on the left of a frog", ("person", "left", "frog")),
        ("a bicycle on the bottom of a girl", ("bicycle", "below", "person")),
        ("a mouse on side of a key", ("mouse", "beside", "key")),
        ("a airplane hidden by a computer", ("airplane", "behind", "computer")),
        ("two cats", None),
    ],
)
def test_places_of_prompts(prompt: str, placed: Any) -> None:
    assert placed_of(prompt) == placed


def test_places_of_sentences_are_of_the_last_words() -> None:
    prompt = "The red hat was on top of the brown coat rack."
    assert placed_of(prompt, by_head=True) == ("hat", "above", "rack")
    prompt = "The round clock was on the right of the wooden chair."
    assert placed_of(prompt, by_head=True) == ("clock", "right", "chair")


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ("two dogs played fetch in the park", [(2, "dog")]),
        ("one girl, four women and six boys", [(1, "person"), (4, "person"), (6, "person")]),
        ("three peaches, two knives and a goldfish", [(3, "peach"), (2, "knife"), (1, "goldfish")]),
        ("eight sheep and two tomatoes", [(8, "sheep"), (2, "tomato")]),
    ],
)
def test_numbers_of_prompts(prompt: str, numbers: Any) -> None:
    assert wanted_numbers(prompt) == numbers


def test_singulars() -> None:
    plurals = "strawberries microwaves wolves buses glasses dishes boxes mice shrimp bus"
    singulars = "strawberry microwave wolf bus glasses dish box mouse shrimp bus"
    assert [singular(word) for word in plurals.split()] == singulars.split()


def square(x: float, y: float, half: float = 20) -> Box:
    return (x - half, y - half, x + half, y + half)


SIZE = (480, 480)
LEFT, RIGHT, DOWN = square(100, 100), square(300, 120), square(110, 300)


@pytest.mark.parametrize(
    ("relation", "a", "b", "right"),
    [
        ("left", LEFT, RIGHT, 1),
        ("right", LEFT, RIGHT, 0),
        ("right", RIGHT, LEFT, 1),
        ("above", LEFT, DOWN, 1),
        ("below", DOWN, LEFT, 1),
        ("above", LEFT, RIGHT, 0),
        # Overlap (40 - 20) 40 / (3200 - 800) = 1/3: .1 of it.
        ("left", LEFT, square(120, 100), 0.3),
        # Offset (200, 20): one is below 150.
        ("beside", LEFT, RIGHT, 1),
        ("beside", LEFT, square(400, 350), 0.5),
    ],
)
def test_places_by_hand(relation: str, a: Box, b: Box, right: float) -> None:
    objects = {"cat": [Found(0.8, a)], "dog": [Found(0.6, b)]}
    expected = 0.25 * (0.8 + 0.6) + right / 2
    score = place_score(("cat", relation, "dog"), objects, SIZE)
    assert score == pytest.approx(expected if expected >= 0.5 else 0)
    # The rules are of pictures of 480 pixels.
    small = {
        name: [Found(one.score, tuple(v / 2 for v in one.box)) for one in own]  # type: ignore[arg-type]
        for name, own in objects.items()
    }
    assert place_score(("cat", relation, "dog"), small, (240, 320)) == pytest.approx(score)


def test_a_thing_that_is_missing_leaves_too_little() -> None:
    assert place_score(("cat", "left", "dog"), {"cat": [Found(1.0, LEFT)]}, SIZE) == 0
    depth = torch.zeros(SIZE)
    score = place_score(("cat", "front", "dog"), {"cat": [Found(0.8, LEFT)]}, SIZE, depth)
    assert score == pytest.approx(0.2)


@pytest.mark.parametrize(("relation", "right"), [("front", 0.5), ("behind", 0)])
def test_depth_by_hand(relation: str, right: float) -> None:
    """Boxes of 40 x 40 that share 24 x 40: an overlap of 3/7 where 1/2 is much."""
    a, b = (100, 100, 140, 140), (116, 100, 156, 140)
    depth = torch.zeros(SIZE)
    depth[100:140, 100:116] = 1.0
    objects = {"cat": [Found(1.0, a)], "dog": [Found(1.0, b)]}
    share = 3 / 7 / 0.5
    score = place_score(("cat", relation, "dog"), objects, SIZE, depth)
    assert score == pytest.approx(0.5 + right * share)


def test_numbers_by_hand() -> None:
    found = {"dog": [Found(0.9, LEFT), Found(0.8, RIGHT)], "cat": [Found(0.9, DOWN)]}
    assert number_score([(2, "dog")], found) == 1
    assert number_score([(2, "dog"), (3, "cat")], found) == 0.75
    assert number_score([(2, "dog"), (1, "bee")], found) == 0.5
    nested = [Found(0.9, LEFT), Found(0.8, (85, 85, 115, 115)), Found(0.7, RIGHT)]
    assert [one.score for one in alone(nested)] == [0.9, 0.7]


class Answers(nn.Module):
    """Stands in for BLIP: how bright the picture is, less for cars."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.asked: list[str] = []

    def forward(self, pictures: Tensor, questions: Sequence[str]) -> Tensor:
        self.asked += questions
        less = torch.tensor([0.5 if "car" in question else 1.0 for question in questions])
        return pictures.mean(dim=(1, 2, 3)) * less


class Finds(nn.Module):
    """Stands in for a detector: two things side by side."""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def forward(self, picture: Tensor, names: Sequence[str], threshold: float) -> list[Tensor]:
        boxes = {"cat": [0.8, 2, 2, 8, 8], "dog": [0.6, 20, 2, 28, 8]}
        return [torch.tensor([boxes[n]] if n in boxes else []).reshape(-1, 5) for n in names]


class Fits(nn.Module):
    """Stands in for CLIP: all cosines are .3."""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return torch.ones(len(pictures), 1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts), 1), 0.3)


def condition(*records: tuple[str, str, str | None], repeat: int = 1) -> Condition:
    names = ("prompt", "category", "relation")
    entries = [dict(zip(names, record, strict=True)) for record in records]
    rows = torch.arange(len(entries)).repeat_interleave(repeat)
    return Condition(entries=entries, tables={}, rows=rows)


def test_categories_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (("BlipVQA", Answers), ("OpenVocabulary", Finds), ("CLIPEncoder", Fits)):
        monkeypatch.setattr(compbench, name, stand_in)
    own = ["color", "spatial", "numeracy", "non_spatial", "complex"]
    metric = T2ICompBench(own, batch_size=3)
    text = "The black cat is on the left of the dog."
    given = condition(
        ("a red car and a blue dog", "color", None),
        ("a cat on the left of a dog", "spatial", None),
        ("a cat and two dogs", "numeracy", None),
        ("A person is looking at a map.", "non_spatial", None),
        (text, "complex", "spatial"),
        (text.lower(), "complex", None),
        ("a round box and a square hat", "shape", None),
    )
    pictures = torch.full((7, 3, 32, 32), 0.8)
    features = metric.features(pictures, given)
    # Of the complex prompt three phrases: the cat, the left, the dog.
    placed, bound = 0.25 * 1.4 + 0.5, 0.8**3
    expected = {
        "color": 0.4 * 0.8,
        "spatial": placed,
        "numeracy": (1 + 0.5) / 2,
        "non_spatial": 0.3,
        "complex": ((bound + placed) / 2 + (bound + placed + 0.3) / 3) / 2,
    }
    assert metric.blip.asked[:2] == ["a red car?", "a blue dog?"]
    found = metric.compare(features)
    whole = {"T2ICompBench": sum(expected.values()) / 5}
    names = {f"T2ICompBench/{name}": value for name, value in expected.items()}
    assert found == pytest.approx(names | whole, rel=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_models(tmp_path_factory.mktemp("models"))


def test_blip_answers_as_transformers_generates(models: Path) -> None:
    """Beside the first step of transformers' own generation, from the same first tokens."""
    network = BlipVQA(str(models / "blip"), torch.float64)
    pictures = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    questions = ["a red cat?", "a dog?"]
    ours = network(pictures, questions)
    read = network.tokenizer(questions, padding=True, return_tensors="pt")
    read.input_ids[:, 0] = network.model.config.text_config.vocab_size - 1
    pixels = network.preprocess(pictures)
    model = network.model
    out = model.generate(
        pixel_values=pixels,
        input_ids=read.input_ids,
        attention_mask=read.attention_mask,
        max_new_tokens=1,
        num_beams=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    likely = out.scores[0].double().softmax(-1)
    yes, no = likely[:, network.yes], likely[:, network.no]
    assert ours.allclose(yes / (yes + no), atol=1e-8)
    assert (ours - 0.5).abs().min() > 1e-3


def test_the_real_classes_score_all_categories(models: Path) -> None:
    folders = {"blip": "blip", "clip": "clip", "detector": "owl", "depth": "depth"}
    paths = {key: str(models / name) for key, name in folders.items()}
    metric = T2ICompBench(**paths, detector_threshold=0.0)
    given = condition(
        ("a red car", "color", None),
        ("a cat on the left of a dog", "spatial", None),
        ("a dog in front of a desk", "3d_spatial", None),
        ("two dogs", "numeracy", None),
        ("a map", "non_spatial", None),
        ("The hat was on top of the rack.", "complex", None),
    )
    features = metric.features(torch.rand(6, 3, 40, 56), given)
    assert features["score"].isfinite().all() and (features["score"].abs() <= 1).all()
    assert metric.detector(torch.rand(3, 40, 56), ["dog", "cat"], 0.0)[1].shape[1] == 5
    assert metric.depth(torch.rand(3, 40, 56)).shape == (40, 56)


def test_wrong_settings(models: Path) -> None:
    clip = str(models / "clip")
    with pytest.raises(UsageError, match="categories must be some of"):
        T2ICompBench(["colour"])
    with pytest.raises(UsageError, match=r"blip: .* could not be loaded as a BLIP that answers"):
        T2ICompBench(["color"], blip=clip)
    with pytest.raises(UsageError, match=r"detector: .* could not be loaded as an OWLv2"):
        T2ICompBench(["spatial"], detector=clip)
    metric = T2ICompBench(["non_spatial"], clip=clip)
    given = Condition(entries=[{"prompt": "a"}], tables={}, rows=torch.tensor([0]))
    with pytest.raises(UsageError, match="needs the 'category' of each prompt"):
        metric.features(torch.rand(1, 3, 8, 8), given)
