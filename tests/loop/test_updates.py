"""How a round's experience becomes updates: which samples, in which order, on which process."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.updates import Shares, Update, accumulate, plan


def experience_of(num: int) -> Experience:
    """Return samples whose seeds are their states."""
    rows = torch.zeros(num, dtype=torch.int64)
    states = {"x": torch.arange(float(num)).unsqueeze(1)}
    return Experience(states, Condition([{}], {}, rows), list(range(num)))


def planned(
    num: int, counts: Sequence[int], num_epochs: int, *, round_index: int = 0
) -> list[Update]:
    return plan(experience_of(num), counts, num_epochs, 4, seed=0, round_index=round_index)


@pytest.mark.parametrize("num", [1, 4, 9, 10, 23])
def test_each_epoch_covers_the_experience_once(num: int) -> None:
    updates = planned(num, [num], 3)
    sizes = [len(update.minibatch) for update in updates]
    assert len(updates) == 3 * -(-num // 4) and max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1 and [update.total for update in updates] == sizes
    orders = []
    for epoch in range(3):
        parts = [update.minibatch for update in updates if update.epoch == epoch]
        order = [seed for part in parts for seed in part.seeds]
        assert sorted(order) == list(range(num))
        # Seeds, states and conditions stay together.
        states = torch.cat([tensor_of(part.states["x"]) for part in parts])
        assert states.flatten().tolist() == order
        orders.append(order)
    if num > 4:
        assert orders[0] != orders[1] != orders[2]
    again = planned(num, [num], 3)
    assert [u.minibatch.seeds for u in again] == [u.minibatch.seeds for u in updates]
    if num > 4:
        later = planned(num, [num], 3, round_index=1)
        assert [u.minibatch.seeds for u in later] != [u.minibatch.seeds for u in updates]


@pytest.mark.parametrize("counts", [(9, 2, 0), (4, 4, 5), (0, 0, 0), (1, 0, 0)])
def test_processes_agree_on_the_number_and_sizes_of_updates(counts: tuple[int, ...]) -> None:
    plans = [planned(num, counts, 2) for num in counts]
    assert {len(updates) for updates in plans} == {2 * -(-max(counts) // 4)}
    for updates in zip(*plans, strict=True):
        assert {u.total for u in updates} == {sum(len(u.minibatch) for u in updates)}
    for own, num in zip(plans, counts, strict=True):
        assert sum(len(update.minibatch) for update in own) == 2 * num


def accumulated(
    counts: Sequence[int], microbatch_size: int | None
) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient of the mean of (w x)^2, averaged over processes as their all-reduce does.

    Beside it what the processes log, averaged likewise, but for the maximum.
    """
    total, grads, logs, first = sum(counts), [], [], 0
    for num in counts:
        weight = nn.Parameter(torch.tensor(2.0))

        def loss(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
            x = tensor_of(part.states["x"])[:, 0]
            return (weight * x).square(), {"x": x, "x_max": x}  # noqa: B023

        rows = torch.arange(first, first := first + num)
        update = Update(experience_of(total).index(rows), 0, total)
        shares = Shares(microbatch_size, world_size=len(counts))
        logs.append(accumulate(update, loss, torch.Tensor.backward, [weight], shares))
        assert weight.grad is not None
        grads.append(weight.grad)
    means = {name: sum(log.get(name, 0.0) for log in logs) / len(logs) for name in ("loss", "x")}
    return torch.stack(grads).mean(), {**means, "x_max": max(log.get("x_max", 0) for log in logs)}


@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 100])
@pytest.mark.parametrize("counts", [(5,), (3, 2), (4, 0, 1)])
def test_gradients_are_those_of_the_mean_whoever_has_the_samples(
    counts: Sequence[int], microbatch_size: int | None
) -> None:
    grad, logged = accumulated(counts, microbatch_size)
    x = torch.arange(5.0)
    assert float(grad) == pytest.approx(float(2 * 2.0 * x.square().mean()))
    expected = {"loss": float(4 * x.square().mean()), "x": float(x.mean()), "x_max": 4.0}
    assert logged == pytest.approx(expected)
