"""GenEval 2's numbers by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.text_to_image.benchmarks import GenEval2
from domains.text_to_image.rewards import SoftTIFA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.evaluation.jackknife import compared

ASKED = [
    {"count": [0.5], "object": [0.2]},
    {"count": [0.9], "object": [0.4, 0.6]},
    {"position": [1.0]},
    {"object": [0.8], "position": [0.1]},
]
"""The reference's probabilities of right answers by skill, a prompt each."""
TUNED = [
    {"count": [0.7], "object": [0.2]},
    {"count": [0.8], "object": [0.6, 0.6]},
    {"position": [0.9]},
    {"object": [0.8], "position": [0.5]},
]

Asked = list[dict[str, list[float]]]


class Asker(SoftTIFA):
    """Knows all answers' probabilities."""

    def __init__(self, asked: Asked) -> None:
        Reward.__init__(self)
        self.average, self.asked = "geometric", asked

    @property
    def name(self) -> str:
        return "SoftTIFA"

    def log_probabilities(self, samples: Any, condition: Condition) -> list[Tensor]:
        return [torch.tensor(flat(self.asked[i])).log() for i in condition.rows.tolist()]


def flat(own: dict[str, list[float]]) -> list[float]:
    return [value for values in own.values() for value in values]


def record(row: int, own: dict[str, list[float]]) -> dict[str, Any]:
    names = [name for name, values in own.items() for _ in values]
    questions = [["Is it there?", "Yes"] for _ in names]
    return {"prompt": str(row), "atom_count": 1 + row % 2, "vqa_list": questions, "skills": names}


def condition() -> Condition:
    entries = [record(i, own) for i, own in enumerate(ASKED)]
    return Condition(entries, {}, torch.arange(len(entries)))


def features(asked: Asked) -> dict[str, Tensor]:
    return GenEval2(Asker(asked)).features(torch.zeros(4, 3, 2, 2), condition())


def geometric(own: dict[str, list[float]]) -> float:
    return math.prod(flat(own)) ** (1 / len(flat(own)))


def test_numbers_by_hand() -> None:
    found = GenEval2(Asker(ASKED)).compare(features(ASKED))
    scores = [geometric(own) for own in ASKED]
    one, two = (scores[0] + scores[2]) / 2, (scores[1] + scores[3]) / 2
    assert found == pytest.approx(
        {
            "SoftTIFA/1": one,
            "SoftTIFA/2": two,
            "SoftTIFA/groups": (one + two) / 2,
            "SoftTIFA/questions": (0.35 + 1.9 / 3 + 1.0 + 0.45) / 4,
            "SoftTIFA/count": 0.7,
            "SoftTIFA/object": (0.2 + 0.4 + 0.6 + 0.8) / 4,
            "SoftTIFA/position": 0.55,
        }
    )


def test_no_samples_have_no_features() -> None:
    none = Condition([], {}, torch.arange(0))
    own = GenEval2(Asker(ASKED)).features(torch.zeros(0, 3, 2, 2), none)
    assert {name: len(value) for name, value in own.items()} == dict.fromkeys(own, 0)
    every = features(ASKED)
    assert {n: v.shape[1:] for n, v in own.items()} == {n: v.shape[1:] for n, v in every.items()}


def test_errors_are_the_jackknifes_to_first_order() -> None:
    """Of 60 prompts both agree within 5 %; two models are compared prompt by prompt."""
    n = 60
    right = torch.rand(2, n, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right[:, :, 3:] = math.nan
    right[:, ::2, 2] = math.nan  # every second prompt has one question less
    own = features(ASKED)
    skill = own["skill"][3:4].expand(n, -1, -1).clone()
    skill[:, 2] = skill[:, 0]
    group = own["group"][:1].expand(n, -1)
    tuned, reference = (
        {"score": one[:, 0], "group": group, "right": one, "skill": skill} for one in right
    )
    metric = GenEval2(Asker(ASKED))
    errors = metric.errors(tuned, reference)
    keys = ["SoftTIFA/object", "SoftTIFA/position", "SoftTIFA/questions"]
    drawn: dict[str, list[float]] = {key: [] for key in keys}
    for i in range(n):
        left = [
            metric.compare({k: torch.cat([v[:i], v[i + 1 :]]) for k, v in arm.items()})
            for arm in (tuned, reference)
        ]
        for key in keys:
            drawn[key].append(left[0][key] - left[1][key])
    for key in keys:
        spread = torch.tensor(drawn[key], dtype=torch.float64)
        jackknife = ((n - 1) / n * (spread - spread.mean()).square().sum()).sqrt()
        assert errors[key] == pytest.approx(float(jackknife), rel=0.05)


def test_gains_and_win_rates() -> None:
    metric = GenEval2(Asker(ASKED))
    found = compared(metric, {"tuned": features(TUNED), "reference": features(ASKED)}, 0)
    gain = {name: one["mean"] for name, one in found["gain"].items()}
    assert gain["SoftTIFA/count"] == pytest.approx((0.2 - 0.1) / 2)
    assert gain["SoftTIFA/object"] == pytest.approx(0.2 / 4)
    assert gain["SoftTIFA/position"] == pytest.approx((-0.1 + 0.4) / 2)
    # Of four prompts the third is worse and the others are better.
    assert found["tuned"]["win_rate/SoftTIFA"]["mean"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"skills": ["count"]}, "has not one skill for each of its 2 questions"),
        ({"skills": None}, "has not one skill for each"),
        ({"skills": ["count", "?"]}, "other than names of skills"),
        ({"vqa_list": [["Is it there?", "Yes"]] * 33}, "has 33 questions, more than 32"),
        ({"vqa_list": []}, "has no questions under 'vqa_list'"),
    ],
)
def test_prompts_that_cannot_be_judged(change: dict[str, Any], sentence: str) -> None:
    own = Condition([record(0, ASKED[0]) | change], {}, torch.arange(1))
    with pytest.raises(UsageError, match=sentence):
        GenEval2(Asker(ASKED)).features(torch.zeros(1, 3, 2, 2), own)
