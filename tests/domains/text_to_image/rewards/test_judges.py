"""Judges that answer in words, and that read: by hand, and rapidocr for real."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw, ImageFont

from domains.text_to_image.rewards import OCRAccuracy, VLMJudge
from domains.text_to_image.rewards.ocr import edit_distance
from lit_rlft.core.checks import BadArgument, UsageError
from tests.domains.text_to_image.rewards.published import llava_folder
from tests.domains.text_to_image.test_set_metrics import prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(llava_folder(tmp_path_factory.mktemp("llava")))


def judge(folder: str, **settings: Any) -> VLMJudge:
    return VLMJudge(folder, **{"dtype": "float32", "max_tokens": 4, **settings})


PAGE = Path(__file__).parents[4] / "docs/domains/rewards.md"
UNIFIED = " ".join(PAGE.read_text().partition('--reward.pattern "')[2].partition('"')[0].split())


@pytest.mark.parametrize(
    ("settings", "answer", "score"),
    [
        ({}, "Two squares instead of one. Score: 7", 0.7),
        ({}, "**Score:** 10", 1.0),
        ({}, "A first score 3 looks low; on reflection: Score = 8.5", 0.85),
        ({}, "I cannot tell.", math.nan),
        ({}, "Score: 11", math.nan),
        ({"scale": (1, 5)}, "score: 2", 0.25),
        ({"scale": (5, 1)}, "score: 2", 0.75),
        (
            {"pattern": UNIFIED, "num_scores": 3, "scale": (0, 5)},
            "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3",
            0.7,
        ),
        (
            {"pattern": UNIFIED, "num_scores": 3, "scale": (0, 5)},
            "Alignment Score (1-5): 3.92\nCoherence Score (1-5): 3.08\nStyle Score (1-5): 4.75",
            11.75 / 15,
        ),
        ({"pattern": UNIFIED, "num_scores": 3}, "Alignment Score (1-5): 4", math.nan),
    ],
)
def test_scores_are_read_from_answers(
    folder: str, settings: dict[str, Any], answer: str, score: float
) -> None:
    reward = judge(folder, **settings)
    assert reward.score(answer) == pytest.approx(score, nan_ok=True)
    assert reward.num_failed == math.isnan(score)


def test_each_picture_is_asked_about_with_its_prompt(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = judge(folder, rubric='Is it "{}"?', batch_size=2)
    asked: list[str] = []

    def says(pictures: torch.Tensor, questions: list[str], max_tokens: int) -> list[str]:
        asked.extend(questions)
        return ["Score: 5" if "red" in question else "hm" for question in questions]

    monkeypatch.setattr(reward.network, "says", says)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # whichever process finds it, says it
    with pytest.warns(UserWarning, match="no score in the answer 'hm'") as told:
        values = reward(torch.rand(3, 3, 28, 28), prompts("red", "blue", "green"))
    assert asked == ['Is it "red"?', 'Is it "blue"?', 'Is it "green"?']
    assert values[0] == 0.5 and values[1:].isnan().all()
    assert len(told) == 1 and reward.num_failed == 2


def test_a_model_without_sense_fails_and_the_run_would_go_on(folder: str) -> None:
    with pytest.warns(UserWarning, match="no score in the answer"):
        values = judge(folder)(torch.rand(2, 3, 28, 28), prompts("red", "blue"))
    assert values.isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": r"\d+"}, "one group"),
        ({"rubric": "{} or {}"}, "rubric"),
        ({"scale": (1, 1)}, "scale"),
        ({"num_scores": 0}, "num_scores"),
    ],
)
def test_impossible_settings_are_refused(
    folder: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadArgument, match=message):
        judge(folder, **settings)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2), ("abc", "", 3)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("prompt", "lines", "accuracy"),
    [
        ('a sign that says "OPEN"', ["open"], 1.0),
        ('a sign that says "New Year"', ["NEW", "YEAR SALE"], 1.0),
        ('a sign that says "OPEN"', ["OPFN"], 0.75),
        ('a sign that says "OPEN"', [], 0.0),
        ('a sign that says "OPEN"', ["a long text about nothing"], 0.0),
        ('"A" and "B"', ["a"], 1.0),
        ("a sign that says “OPEN”", ["open"], 1.0),
    ],
)
def test_accuracy_by_hand(prompt: str, lines: list[str], accuracy: float) -> None:
    reward = OCRAccuracy(engine=lambda pixels: lines)
    assert float(reward(torch.rand(1, 3, 8, 8), prompts(prompt))[0]) == pytest.approx(accuracy)


def test_a_prompt_without_quotes_is_told() -> None:
    with pytest.raises(UsageError, match="no text in double quotes"):
        OCRAccuracy(engine=lambda pixels: [])(torch.rand(1, 3, 8, 8), prompts("a sign"))


def test_an_absent_reader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install lit-rlft\[ocr\]"):
        OCRAccuracy()


def test_rapidocr_reads_a_drawn_text() -> None:
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
    picture = Image.new("RGB", (512, 256), "white")
    font = ImageFont.load_default(48)
    ImageDraw.Draw(picture).text((40, 90), "NEW YEAR SALE", fill="black", font=font)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    shown = torch.stack([pixels, torch.ones_like(pixels)])
    reward = copy.deepcopy(OCRAccuracy())
    values = reward(shown, prompts('a poster that says "New Year Sale"', 'it says "hello"'))
    assert values.tolist() == [1.0, 0.0]
    assert copy.deepcopy(reward)._rapid is None
