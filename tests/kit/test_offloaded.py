"""A reward that waits in the processor's memory: the same numbers, and where its networks are."""

from typing import Any

import pytest
import torch
from torch import nn

from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import CLIPScore, ShapesEval
from lit_rlft.core.checks import BadArgument
from lit_rlft.core.reward import WeightedSum
from lit_rlft.kit.offloaded import Offloaded
from tests.domains.text_to_image.test_set_metrics import prompts

CONDITION = prompts("a red ring", "a blue square")


@pytest.fixture(name="moves")
def _moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where rewards are asked to go, and when they score."""
    found: list[str] = []
    plain, score = nn.Module.to, CLIPScore.forward

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(self, CLIPScore):
            found.append(str(args[0]))
        return plain(self, *args, **kwargs)

    def forward(self: CLIPScore, *args: Any) -> torch.Tensor:
        found.append("score")
        return score(self, *args)

    monkeypatch.setattr(CLIPScore, "to", to)
    monkeypatch.setattr(CLIPScore, "forward", forward)
    return found


def test_it_comes_to_score_and_leaves(moves: list[str]) -> None:
    plain = CLIPScore()
    reward = Offloaded(CLIPScore())
    assert not list(reward.parameters()) and not list(reward.children())
    assert reward.name == "CLIPScore" and reward.differentiable and reward.distinguishes
    shown = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = plain(shown, CONDITION)
    moves.clear()
    assert reward(shown, CONDITION).equal(expected)
    assert moves == ["cpu", "score", "cpu"]
    moves.clear()
    assert reward.evaluate(shown, CONDITION)["CLIPScore"].equal(expected)
    assert moves == ["cpu", "score", "cpu"]


def test_it_stays_for_a_backward_pass(moves: list[str]) -> None:
    reward = Offloaded(CLIPScore())
    reward.check(TextToImagePipeline())
    shown = torch.rand(2, 3, 64, 64).requires_grad_()
    reward(shown, CONDITION).sum().backward()
    assert moves == ["cpu", "score"]
    assert shown.grad is not None and shown.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in reward.reward.parameters())
    moves.clear()
    with torch.no_grad():
        reward(shown, CONDITION)
    assert moves == ["cpu", "score", "cpu"]


def test_details_and_parts_keep_their_names() -> None:
    whole = WeightedSum({"a": Offloaded(ShapesEval()), "b": Offloaded(CLIPScore())})
    plain = WeightedSum({"a": ShapesEval(), "b": CLIPScore()})
    shown = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, expected = (one.evaluate(shown, CONDITION) for one in (whole, plain))
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, equal_nan=True)


def test_a_combination_is_refused() -> None:
    with pytest.raises(BadArgument, match="wrap the parts"):
        Offloaded(WeightedSum({"a": Coordinate()}))
