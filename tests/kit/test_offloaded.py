"""A reward that waits in the processor's memory: the same numbers, and where its networks are."""

from typing import Any

import pytest
import torch
from torch import nn

from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import CLIPScore, ShapesEval
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.kit.offloaded import Offloaded
from lit_rlft.loop.side.rewards import RewardWorkers, SideReward, side_rewards
from lit_rlft.loop.side.worker import SideProcess
from tests.domains.text_to_image.test_set_metrics import prompts
from tests.loop.side_rewards import Sums
from tests.loop.test_reward_workers import alive, fit, logged, tuner_of
from tests.support import assert_equal

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


class Drops(Reward):
    """A reward whose numbers depend on its mode and on the type of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, samples: Any, condition: Condition) -> torch.Tensor:
        return self.net(samples.to(self.net[0].weight))[:, 0]


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_rewards_are_those_of_the_reward_alone(precision: Any) -> None:
    plain, aside = Drops(), Offloaded(Drops())
    aside.reward.load_state_dict(plain.state_dict())
    found = [fit(tuner_of(one), precision=precision) for one in (plain, aside)]
    assert_equal(*(logged(tuner) for tuner in found))
    assert_equal(*(tuner.trainable().state_dict() for tuner in found))


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_in_a_worker_rewards_are_the_same_to_the_last_bit(kind: Any) -> None:
    def both() -> WeightedSum:
        held: dict[str, Reward] = {"a": Offloaded(Sums()), "b": Sums(0.3), "c": Offloaded(Sums(2))}
        return WeightedSum(held, held_out=["c"])

    workers = RewardWorkers(kind=kind)
    ended: list[Any] = []
    stop = SideReward.stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideReward, "stop", lambda s: ended.append(s.worker) or stop(s))
        plain, aside = fit(tuner_of(both())), fit(tuner_of(both(), workers))
    assert_equal(logged(plain), logged(aside))
    assert_equal(plain.trainable().state_dict(), aside.trainable().state_dict())
    used = [worker for worker in ended if worker is not None]
    assert len(used) == 3 == len(side_rewards(aside.reward))
    assert not [w.pid for w in used if isinstance(w, SideProcess) and alive(w.pid)]
    assert [type(worker) is SideProcess for worker in used] == [kind == "process"] * 3


def test_what_a_worker_cannot_hold_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Drops, "__module__", "__main__")
    with pytest.raises(UsageError, match=r"Drops cannot be sent .* move it to a module"):
        fit(tuner_of(Offloaded(Drops()), RewardWorkers()))


def test_a_combination_is_refused() -> None:
    with pytest.raises(BadArgument, match="wrap the parts"):
        Offloaded(WeightedSum({"a": Coordinate()}))
