"""Means per group and win rates by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.text_to_image.benchmarks import RewardByGroup
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.evaluation.jackknife import compared

NAN = math.nan


class Given(Reward):
    """The brightness of a picture, failed below 0.1."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        bright = samples.mean(dim=(1, 2, 3))
        return bright.where(bright > 0.1, NAN)


def features(values: list[float], column: str = "category") -> dict[str, Tensor]:
    names = ("Food & Beverage", "Food & Beverage", "Vehicles", "Vehicles", "Vehicles")
    entries = [{"prompt": str(i), "category": name} for i, name in enumerate(names)]
    condition = Condition(entries=entries, tables={}, rows=torch.arange(5))
    pictures = torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 4, 4)
    return RewardByGroup(Given(), column).features(pictures, condition)


def test_win_rates_by_hand() -> None:
    """Wins: 1, 0 of food; 1, a tie, and a pair that failed of vehicles."""
    tuned, reference = features([0.5, 0.2, 0.6, 0.4, 0.9]), features([0.4, 0.3, 0.2, 0.4, 0.0])
    found = compared(RewardByGroup(Given()), {"tuned": tuned, "reference": reference}, 2)
    wins = {name: one for name, one in found["tuned"].items() if name.startswith("win_rate")}
    assert {name: one["mean"] for name, one in wins.items()} == pytest.approx(
        {
            "win_rate/Given": 2.5 / 4,
            "win_rate/Given/food_beverage": 0.5,
            "win_rate/Given/vehicles": 0.75,
        }
    )
    expected = torch.tensor([1.0, 0, 1, 0.5]).std().item() / 2
    assert wins["win_rate/Given"]["sem"] == pytest.approx(expected)
    assert set(found["reference"]) == set(found["gain"])
    assert found["gain"]["Given/food_beverage"]["mean"] == pytest.approx(0)
    differences = torch.tensor([0.1, -0.1]).std().item() / 2**0.5
    assert found["gain"]["Given/food_beverage"]["sem"] == pytest.approx(differences)


def test_second_copies_of_samples_say_nothing_new() -> None:
    """Copies are samples of one row: means, gains, win rates and their errors stay."""
    values = {"tuned": [0.5, 0.2, 0.6, 0.4, 0.9], "reference": [0.4, 0.3, 0.2, 0.4, 0.0]}
    arms = {arm: features(own) for arm, own in values.items()}
    twice = {
        arm: {name: x.repeat_interleave(2, dim=0) for name, x in own.items()}
        for arm, own in arms.items()
    }
    rows = dict.fromkeys(arms, torch.arange(5).repeat_interleave(2))
    single = compared(RewardByGroup(Given()), arms, 2)
    double = compared(RewardByGroup(Given()), twice, 2, rows=rows)
    for arm, found in single.items():
        for name, moments in found.items():
            assert double[arm][name] == pytest.approx(moments, abs=1e-12), (arm, name)


def test_means_by_hand() -> None:
    found = compared(RewardByGroup(Given()), {"tuned": features([0.5, 0.2, 0.6, 0.4, 0.0])}, 2)
    means = {name: one["mean"] for name, one in found["tuned"].items()}
    expected = {"Given/food_beverage": 0.35, "Given/vehicles": 0.5, "Given/groups": 0.425}
    assert means == pytest.approx(expected)


def test_data_without_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="needs the 'style' of each prompt, but the data have"):
        features([0.5] * 5, "style")
