"""T2I-CompBench's rules and aggregation by hand, BLIP-VQA against the parts of its model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from domains.text_to_image.benchmarks import Found, OWLv2, T2ICompBench
from domains.text_to_image.benchmarks.compbench import place_score
from domains.text_to_image.phrases import (
    Counted,
    Placed,
    counted_things,
    noun_phrases,
    placed_things,
)
from domains.text_to_image.rewards import BLIPVQA
from domains.text_to_image.sources.prompts import PromptFile
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from tests.domains.text_to_image.benchmarks.test_geneval import Scripted, condition
from tests.domains.text_to_image.benchmarks.tiny import blip_folder, owl_folder
from tests.domains.text_to_image.test_set_metrics import prompts

PROMPTS = Path(__file__).parents[4] / ".." / "shared" / "data" / "prompts"


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("rubber gloves and a fluffy teddy bear", ["rubber gloves", "a fluffy teddy bear"]),
        ("A black cat is inside a white toilet.", ["A black cat", "a white toilet"]),
        ("The red hat was on top of the brown coat rack.", ["The red hat", "the brown coat rack"]),
        ("A long, narrow yellow kitchen", ["A long narrow yellow kitchen"]),
        (
            "The diamond ring adorned the delicate finger",
            ["The diamond ring", "the delicate finger"],
        ),
        ("", []),
    ],
)
def test_noun_phrases(prompt: str, phrases: list[str]) -> None:
    assert noun_phrases(prompt) == phrases


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("four trucks", [(4, "truck")]),
        ("four tents, two boats and one pig", [(4, "tent"), (2, "boat"), (1, "pig")]),
        ("seven women", [(7, "woman")]),
        ("three fish", [(3, "fish")]),
        ("two hot dogs", [(2, "hot dog")]),
        ("six people gathered for a picnic", [(6, "person"), (1, "picnic")]),
        ("two butterflies and a bus", [(2, "butterfly"), (1, "bus")]),
        ("a sign", [(1, "sign")]),
    ],
)
def test_counted_things(prompt: str, things: list[tuple[int, str]]) -> None:
    assert counted_things(prompt) == [Counted(*thing) for thing in things]


@pytest.mark.parametrize(
    ("prompt", "placed"),
    [
        ("a giraffe next to a lamp", Placed("giraffe", "next to", "lamp")),
        ("a girl on the top of a frog", Placed("girl", "on the top of", "frog")),
        ("a horse on side of a bicycle", Placed("horse", "on side of", "bicycle")),
        ("a red cup", None),
    ],
)
def test_placed_things(prompt: str, placed: Placed | None) -> None:
    assert placed_things(prompt) == placed


A, B = (0.0, 0.0, 100.0, 100.0), (300.0, 0.0, 400.0, 100.0)


@pytest.mark.parametrize(
    ("place", "first", "second", "score"),
    [
        ("on the left of", A, B, 1.0),
        ("on the right of", A, B, 0.0),
        ("on the right of", B, A, 1.0),
        ("on the top of", A, (0.0, 300.0, 100.0, 400.0), 1.0),
        ("on the bottom of", A, (0.0, 300.0, 100.0, 400.0), 0.0),
        ("on the top of", A, B, 0.0),
        ("next to", A, B, 1.0),  # at the same height
        ("near", A, (300.0, 300.0, 400.0, 400.0), 0.5),  # 300 pixels in both directions
        # Half of each box is common: the overlap is a third.
        ("on the left of", A, (50.0, 0.0, 150.0, 100.0), 0.3),
    ],
)
def test_place_scores(
    place: str, first: Sequence[float], second: Sequence[float], score: float
) -> None:
    assert place_score(place, first, second) == pytest.approx(score)


class Fixed(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.full((len(condition),), 0.6)


def thing(score: float, *box: float) -> Found:
    return Found(score, (box[0], box[1], box[2], box[3]))


def scores(prompt: str, category: str, seen: dict[str, list[Found]]) -> float:
    metric = T2ICompBench(Fixed(), Scripted([seen]), clip="shapes_clip")
    record = {"prompt": prompt, "category": category}
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    values = metric.evaluate(picture, condition(record))
    assert list(values) == [f"t2i_compbench/{category}"]
    return float(values[f"t2i_compbench/{category}"][0])


@pytest.mark.parametrize(
    ("prompt", "category", "seen", "score"),
    [
        ("a red cup and a blue bowl", "color", {}, 0.6),
        # 0.25 (0.8 + 0.6) + 0.5
        (
            "a cup on the left of a bowl",
            "spatial",
            {"cup": [thing(0.8, *A)], "bowl": [thing(0.6, *B)]},
            0.85,
        ),
        # One thing alone stays below a half.
        ("a cup on the left of a bowl", "spatial", {"cup": [thing(0.8, *A)]}, 0.0),
        # 0.25 (0.9 + 0.9) at the wrong place is below a half too.
        (
            "a cup on the right of a bowl",
            "spatial",
            {"cup": [thing(0.9, *A)], "bowl": [thing(0.9, *B)]},
            0.0,
        ),
        ("a girl near a bowl", "spatial", {"person": [thing(1, *A)], "bowl": [thing(1, *B)]}, 1.0),
        # Two cups of two, two bowls of one: (1 + 0.5) / 2; a box within another is no third cup.
        (
            "two cups and one bowl",
            "numeracy",
            {
                "cup": [thing(0.9, *A), thing(0.8, *B), thing(0.7, 0, 0, 99, 99)],
                "bowl": [thing(0.9, *A), thing(0.9, *B)],
            },
            0.75,
        ),
        ("two cups and one bowl", "numeracy", {}, 0.0),
    ],
)
def test_categories_by_hand(
    prompt: str, category: str, seen: dict[str, list[Found]], score: float
) -> None:
    assert scores(prompt, category, seen) == pytest.approx(score)


def test_complex_prompts_take_places_or_actions() -> None:
    seen = {"hat": [thing(0.8, *A)], "rack": [thing(0.8, 0, 300, 100, 400)]}
    placed = scores("The hat was on top of the rack.", "complex", seen)
    assert placed == pytest.approx((0.6 + 0.4 + 0.5) / 2)
    acting = scores("The dog chased the cat.", "complex", {})
    alone = scores("The dog chased the cat.", "non_spatial", {})
    assert acting == pytest.approx((0.6 + alone) / 2)


def test_every_picture_belongs_to_its_category() -> None:
    records = [
        {"prompt": "a red cup", "category": "color"},
        {"prompt": "two cups", "category": "numeracy"},
        {"prompt": "a cup behind a bowl", "category": "3d_spatial"},
    ]
    metric = T2ICompBench(Fixed(), Scripted([{}]), clip="shapes_clip")
    values = metric.evaluate(torch.rand(3, 3, 64, 64), condition(*records))
    assert values["t2i_compbench/color"].isfinite().tolist() == [True, False, False]
    assert values["t2i_compbench/numeracy"].isfinite().tolist() == [False, True, False]
    with pytest.raises(UsageError, match="category"):
        metric.evaluate(torch.rand(1, 3, 64, 64), condition({"prompt": "a cup"}))


def test_a_pattern_of_files_gives_the_category(tmp_path: Path) -> None:
    for name in ("color", "3d_spatial"):
        (tmp_path / f"t2i_{name}_val.txt").write_text(f"a prompt of {name}\n")
    records = PromptFile(str(tmp_path / "t2i_*_val.txt")).load()
    assert [(r["prompt"], r["category"]) for r in records] == [
        ("a prompt of 3d_spatial", "3d_spatial"),
        ("a prompt of color", "color"),
    ]
    with pytest.raises(UsageError, match="there is no file"):
        PromptFile(str(tmp_path / "other_*.txt")).load()
    with pytest.raises(UsageError, match=r"several \*"):
        PromptFile(str(tmp_path / "*_*.txt")).load()


def test_the_published_files_load_by_a_pattern() -> None:
    if not (PROMPTS / "t2i_compbench_color_val.txt").is_file():
        pytest.skip("the published prompts are not here")
    records = PromptFile(str(PROMPTS / "t2i_compbench_*_val.txt")).load()
    assert len(records) == 2400 and len({record["category"] for record in records}) == 8
    spatial = [r["prompt"] for r in records if r["category"] == "spatial"]
    assert all(placed_things(prompt) for prompt in spatial)
    assert all(counted_things(r["prompt"]) for r in records if r["category"] == "numeracy")
    assert all(noun_phrases(record["prompt"]) for record in records)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip_folder(tmp_path_factory.mktemp("blip"))


def test_blip_vqa_is_the_product_of_its_models_answers(blip: Path) -> None:
    reward = BLIPVQA(str(blip), batch_size=2)
    model = BlipForQuestionAnswering.from_pretrained(blip).eval()
    shown = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shown = (shown * 255).round() / 255
    given = prompts("a green bench and a blue bowl", "a red car")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    words = (blip / "vocab.txt").read_text().split("\n")
    expected = []
    for picture, phrases in zip(
        shown, (["a green bench", "a blue bowl"], ["a red car"]), strict=True
    ):
        product = torch.ones(())
        for phrase in phrases:
            # The mark of a question, the words, a question mark and the end.
            own = [len(words), *(words.index(w) for w in phrase.split()), words.index("?"), 3]
            ids = torch.tensor([own])
            with torch.no_grad():
                seen = model.vision_model(pixel_values=((picture - mean) / std)[None])[0]
                read = model.text_encoder(
                    ids, torch.ones_like(ids), encoder_hidden_states=seen, is_decoder=False
                )[0]
                start = torch.tensor([[len(words) - 1]])
                logits = model.text_decoder(start, encoder_hidden_states=read).logits[0, 0]
            product = product * logits[[words.index("yes"), words.index("no")]].softmax(0)[0]
        expected.append(product)
    assert reward(shown, given).allclose(torch.stack(expected), rtol=1e-4)


def test_blip_vqa_has_a_gradient_and_takes_other_phrases(blip: Path) -> None:
    reward = BLIPVQA(str(blip), phrases=lambda text: text.split(";")).double()
    shown = (torch.rand(1, 3, 40, 40, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    given = prompts("a green bench;a bowl")
    reward(shown, given).sum().backward()
    direction = torch.randn_like(shown)
    with torch.no_grad():
        ahead, behind = (reward(shown + s * 1e-5 * direction, given).sum() for s in (1, -1))
    slope = (shown.grad * direction).sum()
    assert torch.isclose((ahead - behind) / 2e-5, slope, rtol=1e-4) and slope.abs() > 1e-9
    assert float(reward(shown, prompts("a bowl"))[0]) > float(reward(shown, given)[0])


def test_each_picture_is_looked_at_once(blip: Path) -> None:
    reward, seen = BLIPVQA(str(blip)), []
    reward.network.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    reward(torch.rand(2, 3, 32, 32), prompts("a green bench and a blue bowl and a car", "a bowl"))
    assert seen == [2]


def test_a_tiny_owl_finds_boxes(tmp_path: Path) -> None:
    detector = OWLv2(str(owl_folder(tmp_path)))
    pictures = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    seen, nothing = detector.find(pictures, [["red ring", "blue square"], []], 0.0)
    assert set(seen) == {"red ring", "blue square"} and nothing == {}
    assert sum(map(len, seen.values())) == 16  # a box for every patch
    for own in seen.values():
        assert [one.score for one in own] == sorted((one.score for one in own), reverse=True)
    none = detector.find(pictures, [["red ring"], ["red ring"]], 1.0)
    assert none == [{"red ring": []}] * 2
