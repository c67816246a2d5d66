"""Advantages of one reward and of several, against their definitions by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.cli import main
from lit_rlft.core.advantage import (
    Advantage,
    BatchAdvantage,
    GroupAdvantage,
    LeaveOneOutAdvantage,
    RunningAdvantage,
)
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Product, Reward, WeightedSum
from lit_rlft.loop.advantages import check_decoupled, compare
from tests.support import scalars

REWARD = """
reward:
  class_path: WeightedSum
  init_args:
    rewards:
      far: {class_path: Coordinate, init_args: {axis: 0}}
      near: {class_path: Quadratic}
    weights: {near: 0.5}
"""
TINY = [
    "--data.num_train=8", "--data.batch_size=8", "--data.num_val=2", "--data.num_test=2",
    "--model.sampler.num_steps=3", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip
SEEDS, M = (5, 3, 9), 4
CONDITION = Condition([{"name": name} for name in "abc"], {}, torch.arange(3))
WEIGHTS = (2.0, -0.5)


def rewards(seed: int = 0) -> Tensor:
    """Return rewards [12, 2] of two very different units."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, generator=generator, dtype=torch.float64) * torch.tensor([1e-3, 50.0])


def advantages(values: Tensor, advantage: Advantage | None = None, **settings: Any) -> Tensor:
    given: dict[str, Any] = {"clip": None, "source": "Test", "world_size": 1, "weights": WEIGHTS}
    rule = advantage or GroupAdvantage()
    return compare(values, CONDITION, SEEDS, advantage=rule, **{**given, **settings})[0]


def by_hand(values: Tensor) -> Tensor:
    """Return GDPO's advantages: each reward over its group, their sum over the round."""
    groups = values.numpy().reshape(3, M, 2)
    sums = np.zeros((3, M))
    for i, weight in enumerate(WEIGHTS):
        for g in range(3):
            own = groups[g, :, i]
            sums[g] += weight * (own - own.mean()) / (own.std() + 1e-6)
    return torch.from_numpy(((sums - sums.mean()) / (sums.std() + 1e-6)).reshape(-1))


def test_several_rewards_are_compared_each_for_itself() -> None:
    values = rewards()
    found = advantages(values)
    torch.testing.assert_close(found, by_hand(values), rtol=1e-9, atol=1e-9)
    assert found.abs().max() > 1
    torch.testing.assert_close(advantages(values, clip=0.5), found.clamp(-0.5, 0.5))


def test_what_is_logged_of_several_rewards_is_their_weighted_sum() -> None:
    values = rewards()
    values[6, 1] = torch.nan
    given: dict[str, Any] = {"clip": 0.5, "source": "Test", "world_size": 1, "weights": WEIGHTS}
    found, logged = compare(values, CONDITION, SEEDS, advantage=GroupAdvantage(), **given)
    assert logged["reward"] == pytest.approx(np.nanmean(values.numpy() @ np.array(WEIGHTS)))
    assert logged["failed_rewards"] == pytest.approx(1 / 12)
    assert logged["advantage_std"] == pytest.approx(found.numpy().std())
    assert logged["zero_variance_groups"] == 0


def test_the_order_of_groups_is_that_of_their_seeds() -> None:
    """As processes share them out: what is remembered of a condition is the latest by seed."""
    values, alike = rewards()[:, :1].view(3, M), Condition([{}], {}, torch.zeros(3).long())
    states = []
    for order in ([0, 1, 2], [2, 0, 1]):
        rule, seeds = RunningAdvantage(buffer_size=6, min_count=4), [SEEDS[i] for i in order]
        given: dict[str, Any] = {"clip": None, "source": "Test", "world_size": 1}
        compare(values[order].flatten(), alike, seeds, advantage=rule, **given)
        states.append(rule.state_dict()["rewards"])
    assert torch.equal(*states) and torch.equal(states[0][-M:], values[2])


def test_units_of_a_reward_do_not_matter() -> None:
    values = rewards()
    other = values * torch.tensor([1e4, 0.1]) + torch.tensor([-7.0, 300.0])
    torch.testing.assert_close(advantages(other), advantages(values), rtol=1e-2, atol=1e-3)
    whole = compare(
        values.sum(dim=1), CONDITION, SEEDS, advantage=GroupAdvantage(), clip=None, source="Test",
        world_size=1,
    )[0]  # fmt: skip
    # Added before they are compared, the larger unit decides alone.
    alone = advantages(values[:, 1:], weights=(1.0,))
    torch.testing.assert_close(whole, alone, rtol=1e-2, atol=1e-3)


def test_what_a_sum_cannot_tell_apart_stays_apart() -> None:
    """GDPO, section 3: two binary rewards, of which one is rarely earned."""
    values = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 0]]).double().repeat(3, 1)
    sums = compare(
        values.sum(dim=1), CONDITION, SEEDS, advantage=GroupAdvantage(), clip=None, source="Test",
        world_size=1,
    )[0]  # fmt: skip
    assert sums[0] == sums[1] == sums[2]
    found = advantages(values, weights=(1.0, 1.0))
    assert found[0] > found[1] == found[2] > found[3]


def test_a_sample_that_failed_by_one_reward_teaches_nothing() -> None:
    values = rewards()
    values[6, 1] = torch.nan
    found = advantages(values)
    assert found[6] == 0 and (found[torch.arange(12) != 6] != 0).all()
    with pytest.raises(UsageError, match="Test failed for all 12 samples"):
        advantages(values * torch.nan)


def test_a_failed_part_says_nothing_of_samples_without_information() -> None:
    """The failed one is no peer in its other parts either: the others' sum would not be 0."""
    values = rewards()
    values[6, 1] = torch.nan
    values[8:] = values[8]  # a group of equals
    found = advantages(values)
    assert found[6] == 0 and float(found[8:].abs().max()) < 1e-12
    without = values.view(3, M, 2)[1][[0, 1, 3]].numpy()
    own = sum(
        weight * (part - part.mean()) / (part.std() + 1e-6)
        for weight, part in zip(WEIGHTS, without.T, strict=True)
    )
    scale = float(found[4]) / own[0]
    np.testing.assert_allclose(found[[4, 5, 7]].numpy(), scale * own, rtol=1e-4)


@pytest.mark.parametrize("kind", [BatchAdvantage, RunningAdvantage])
def test_statistics_of_several_rewards_are_kept_apart(kind: type[Advantage]) -> None:
    settings = {"buffer_size": 8, "min_count": 4} if kind is RunningAdvantage else {}
    rule, *own = (kind(**settings) for _ in range(3))
    for values in (rewards(), rewards(1)):  # of the second round, the running ones know the first
        alone = [
            weight * advantages(values[:, i], own[i], weights=(1.0,))
            for i, weight in enumerate(WEIGHTS)
        ]
        total = torch.stack(alone).sum(dim=0)
        expected = (total - total.mean()) / (total.std(correction=0) + 1e-6)
        torch.testing.assert_close(advantages(values, rule), expected, rtol=1e-9, atol=1e-9)


def test_only_sums_have_parts_to_compare() -> None:
    first, second, owner = Coordinate(0), Coordinate(1), object()
    total = WeightedSum({"a": first, "b": second}, {"b": -0.5})
    check_decoupled(total, GroupAdvantage(), owner)
    others: list[Reward] = [
        first,
        Product({"a": first, "b": second}),
        WeightedSum({"a": first, "b": second}, held_out=["b"]),
    ]
    for reward in others:
        with pytest.raises(UsageError, match="decoupled_rewards must be false"):
            check_decoupled(reward, GroupAdvantage(), owner)
    with pytest.raises(UsageError, match=r"false beside LeaveOneOutAdvantage.*to GroupAdvantage"):
        check_decoupled(total, LeaveOneOutAdvantage(), owner)


@pytest.mark.parametrize("algorithm", ["grpo", "noise_ppo"])
def test_a_fit_by_two_rewards_of_any_units(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.yaml").write_text(REWARD)
    words = ["fit", "--config=gaussian_mixture", f"--config={algorithm}", *TINY]
    main([*words, "--config=reward.yaml", "--model.decoupled_rewards=true", "--name=both"])
    (logged,) = scalars("both")["train/advantage_std"]
    assert logged == pytest.approx(1, abs=1e-4)  # compared over the round
    with pytest.raises(SystemExit, match="decoupled_rewards must be false for Coordinate"):
        main([*words, "--model.decoupled_rewards=true", "--reward=Coordinate", "--name=one"])
