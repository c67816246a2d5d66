import copy
import io
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_rlft.core import advantage as advantage_module
from lit_rlft.core.advantage import (
    Advantage,
    BatchAdvantage,
    GroupAdvantage,
    RunningAdvantage,
    constant_groups,
)
from lit_rlft.core.checks import UsageError

NAMES = ["a", "b", "a"]
REWARDS = torch.tensor([[1.0, 2.0, 4.0, 9.0], [0.5, 0.25, 0.5, 0.0], [3.0, 3.0, 5.0, 7.0]])
NAN = math.nan


def by_hand(values: np.ndarray, peers: np.ndarray) -> np.ndarray:
    return (values - peers.mean()) / (peers.std() + 1e-6)


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_groups_and_batches_against_numpy() -> None:
    r = REWARDS.double().numpy()
    close(GroupAdvantage()(REWARDS, NAMES), np.stack([by_hand(row, row) for row in r]))
    close(BatchAdvantage()(REWARDS, NAMES), by_hand(r, r))


def test_groups_by_the_deviation_of_the_round() -> None:
    """Flow-GRPO's: the own group's mean, and the standard deviation of all rewards."""
    found = GroupAdvantage("round")(REWARDS, NAMES)
    r = REWARDS.double().numpy()
    close(found, (r - r.mean(axis=1, keepdims=True)) / (r.std() + 1e-6))
    # By hand: 12 rewards of mean 35.25 / 12; those of the second group differ the least.
    assert r.std() == pytest.approx(2.7540, abs=1e-4)
    assert float(found[1].abs().max()) == pytest.approx(0.3125 / 2.7540, abs=1e-5)


def test_a_constant_group_has_nothing_also_by_the_deviation_of_the_round() -> None:
    rewards = torch.tensor([[0.1] * 7, [1.0, NAN, 2.0, 3.0, 4.0, 5.0, 6.0]])
    found = GroupAdvantage("round")(rewards, ["a", "b"])
    assert not found[0].any() and found[1, 1] == 0
    known = rewards[rewards.isfinite()].double().numpy()
    assert float(found[1, 0]) == pytest.approx((1 - 21 / 6) / known.std(), rel=1e-5)


def test_running_statistics_against_a_plain_list() -> None:
    """The latest 6 rewards of a condition, or the round where there are fewer than 4."""
    advantage, seen = RunningAdvantage(buffer_size=6, min_count=4), dict[str, list[float]]()
    generator = torch.Generator().manual_seed(0)
    used = set()
    for _ in range(5):
        rewards = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        r = rewards.numpy()
        for name, row in zip(NAMES, r, strict=True):
            seen[name] = [*seen.get(name, []), *row][-6:]
        own = [len(seen[name]) >= 4 for name in NAMES]
        used |= set(own)
        peers = [np.array(seen[n]) if enough else r for n, enough in zip(NAMES, own, strict=True)]
        expected = np.stack([by_hand(row, p) for row, p in zip(r, peers, strict=True)])
        close(advantage(rewards, NAMES), expected)
    assert used == {True, False}


@pytest.mark.parametrize("rule", [GroupAdvantage(), BatchAdvantage(), RunningAdvantage(4, 2)])
def test_integer_rewards_are_not_truncated(rule: Advantage) -> None:
    integers = torch.tensor([[1, 2, 4, 9], [0, 1, 0, 0], [3, 3, 5, 7]])
    found, again = (
        copy.deepcopy(rule)(rewards, NAMES) for rewards in (integers, integers.double())
    )
    assert found.dtype == torch.float64 and found.frac().any()
    assert torch.equal(found, again)


@pytest.mark.parametrize("rule", [GroupAdvantage(), BatchAdvantage(), RunningAdvantage(4, 2)])
def test_failed_rewards_are_nobodys_peers(rule: Advantage) -> None:
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0], [NAN, NAN, NAN, NAN], [1.0, 3.0, math.inf, 0.0]])
    found = rule(rewards, ["a", "b", "c"])
    assert found.isfinite().all()
    assert (found[~rewards.isfinite()] == 0).all() and found[rewards.isfinite()].all()
    if isinstance(rule, GroupAdvantage):
        close(found[0, [0, 2, 3]], by_hand(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])))


@pytest.mark.parametrize("rule", [GroupAdvantage(), BatchAdvantage(), RunningAdvantage()])
def test_equal_rewards_give_exactly_nothing(rule: Advantage) -> None:
    # Of doubles: a plain mean of 7, or of 21, is off by a rounding error.
    for value in (0.1, 1 / 3):
        equal = torch.full((3, 7), value, dtype=torch.float64)
        assert not copy.deepcopy(rule)(equal, NAMES).any()


def test_clip() -> None:
    rewards = torch.zeros(1, 100)
    rewards[0, 0] = 1.0
    free, clipped = (GroupAdvantage()(rewards, ["a"], clip) for clip in (None, 5.0))
    assert free[0, 0] > 9 and clipped[0, 0] == 5
    assert torch.equal(free[0, 1:], clipped[0, 1:])


def test_statistics_survive_a_checkpoint_exactly() -> None:
    first, second, fresh = (RunningAdvantage(16, 4) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randn(4, 3, 4, generator=generator)
    for rewards in rounds[:2]:
        first(rewards, NAMES)
    second.load_state_dict(through_a_file(first.state_dict()))
    for rewards in rounds[2:]:
        resumed = second(rewards, NAMES)
        assert torch.equal(first(rewards, NAMES), resumed)
        assert not torch.equal(fresh(rewards, NAMES), resumed)


class Deques:
    """Running statistics as they were kept before: a deque of floats per condition, for ever."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def __call__(self, rewards: Tensor, conditions: list[str]) -> Tensor:
        for group, name in zip(rewards.double(), conditions, strict=True):
            buffer = self.buffers.setdefault(name, deque(maxlen=self.buffer_size))
            buffer.extend(group[group.isfinite()].tolist())
        peers = BatchAdvantage().peers(rewards.double(), conditions)
        for i, name in enumerate(conditions):
            if len(self.buffers[name]) >= self.min_count:
                peers[i] = torch.tensor(list(self.buffers[name]), dtype=torch.float64)
        return Given(peers)(rewards, conditions)


class Given(Advantage):
    def __init__(self, peers: list[Tensor]) -> None:
        self.given = peers

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return self.given


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def drawn(num_rounds: int, num_conditions: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Rounds of 6 groups of 3, some of one condition, some rewards failed, not float32 numbers."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_rounds):
        rewards = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        failed = torch.rand(6, 3, generator=generator) < 0.1
        chosen = torch.randint(num_conditions, (6,), generator=generator)
        yield rewards.masked_fill(failed, NAN), [f"c{i}" for i in chosen.tolist()]


def test_tensors_hold_what_deques_held_to_the_last_bit() -> None:
    """Also through a checkpoint of tensors, and from one of lists, into buffers of another size."""
    tensors, deques = RunningAdvantage(8, 4), Deques(8, 4)
    for i, (rewards, names) in enumerate(drawn(60, 100)):
        if i == 20:
            state = through_a_file(tensors.state_dict())
            tensors = RunningAdvantage(8, 4)
            tensors.load_state_dict(state)
        if i == 40:
            tensors, held = RunningAdvantage(5, 4), deques.buffers
            tensors.load_state_dict({name: list(buffer) for name, buffer in held.items()})
            deques = Deques(5, 4)
            deques.buffers = {name: deque(buffer, maxlen=5) for name, buffer in held.items()}
        assert torch.equal(tensors(rewards, names), deques(rewards, names))
    assert len(deques.buffers) > 64 and tensors.state_dict()["rewards"].dtype == torch.float64


def test_conditions_seen_longest_ago_are_forgotten_and_start_anew() -> None:
    """Those of a round are kept until its end, however many; the memory stays as it is."""
    advantage, sizes = RunningAdvantage(8, 4, max_conditions=20), set()
    kept: OrderedDict[str, deque[float]] = OrderedDict()
    for rewards, names in drawn(300, 200):
        for group, name in zip(rewards, names, strict=True):
            kept.setdefault(name, deque(maxlen=8)).extend(group[group.isfinite()].tolist())
            kept.move_to_end(name)
        peers = BatchAdvantage().peers(rewards, names)
        own = [torch.tensor(kept[name], dtype=torch.float64) for name in names]
        peers = [o if len(o) >= 4 else p for o, p in zip(own, peers, strict=True)]
        assert torch.equal(advantage(rewards, names), Given(peers)(rewards, names))
        while len(kept) > 20:
            kept.popitem(last=False)
        sizes.add(len(advantage.state_dict()["counts"]))
    assert max(sizes) == 20 and advantage._rewards.shape == (64, 8)


def test_a_checkpoint_holds_single_precision_where_that_is_exact() -> None:
    advantage = RunningAdvantage()
    advantage(REWARDS, NAMES)
    state = advantage.state_dict()
    assert state["rewards"].dtype == torch.float32 and state["counts"].tolist() == [4, 8]
    again = RunningAdvantage()
    again.load_state_dict(state)
    more = torch.rand(3, 12, dtype=torch.float64)
    assert torch.equal(again(more, NAMES), advantage(more, NAMES))


def test_groups_of_one_condition_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by what they come to, which one after the other gives too."""
    rewards, counted = torch.randn(12, 3, dtype=torch.float64), []
    moments = advantage_module._moments
    monkeypatch.setattr(
        advantage_module, "_moments", lambda own: counted.append(len(own)) or moments(own)
    )
    rule = RunningAdvantage(buffer_size=8, min_count=2)
    rule(rewards, ["a", "b", "a"] * 4)
    assert counted == [8, 8]
    alone = RunningAdvantage(buffer_size=8, min_count=2)
    for group, name in zip(rewards, ["a", "b", "a"] * 4, strict=True):
        alone(group.unsqueeze(0), [name])
    found, expected = rule.state_dict(), alone.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_constant_groups() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, NAN], [NAN, 1.0, NAN], [0.1, NAN, 0.1]])
    assert constant_groups(rewards) == 2 / 3
    assert math.isnan(constant_groups(torch.ones(3, 1)))


def test_bad_settings() -> None:
    with pytest.raises(UsageError, match=r"num_candidates is 1.*RunningAdvantage"):
        GroupAdvantage().check(1)
    GroupAdvantage().check(2)
    BatchAdvantage().check(1)
    for sizes in ((16, 32), (16, 1)):
        with pytest.raises(UsageError, match="min_count must be"):
            RunningAdvantage(*sizes)
    with pytest.raises(UsageError, match="max_conditions must be at least 1, got 0"):
        RunningAdvantage(max_conditions=0)
