"""How a round's experience becomes updates: which samples, in which order, on which process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lit_rlft.core import randomness
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.batch_sizes import BatchSizes, finishing
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.updates import Loss, Passes, Update, accumulate, layout, plan


def experience_of(num: int) -> Experience:
    """Return samples whose seeds are their states."""
    rows = torch.zeros(num, dtype=torch.int64)
    states = {"x": torch.arange(float(num)).unsqueeze(1)}
    return Experience(states, Condition([{}], {}, rows), list(range(num)))


def planned(num: int, num_epochs: int, *, round_index: int = 0) -> list[Update]:
    """Return the updates of one process alone."""
    experience = experience_of(num)
    sizes = (num_epochs, 4, 0, round_index)
    return plan(experience, [layout(experience, num)], 0, *sizes)


@pytest.mark.parametrize("num", [1, 4, 9, 10, 23])
def test_each_epoch_covers_the_experience_once(num: int) -> None:
    updates = planned(num, 3)
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
    again = planned(num, 3)
    assert [u.minibatch.seeds for u in again] == [u.minibatch.seeds for u in updates]
    if num > 4:
        later = planned(num, 3, round_index=1)
        assert [u.minibatch.seeds for u in later] != [u.minibatch.seeds for u in updates]


def test_a_loss_that_draws_nothing_costs_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, (update, *_) = nn.Parameter(torch.ones(())), planned(4, 1)
    monkeypatch.setattr(randomness, "generators", lambda seeds: pytest.fail("made for nothing"))

    def loss(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        assert noise is not None and len(noise) == len(part)
        return weight * tensor_of(part.states["x"]).flatten(), {}

    accumulate(update, loss, Passes(torch.Tensor.backward, [weight], 2))
    assert weight.grad == 1.5


class Several(Experience):
    """A loss with as many terms as the sample's number says, 0 to 3."""

    @property
    def terms_per_sample(self) -> Tensor:
        return torch.tensor(self.seeds) % 4


def shared(counts: Sequence[int], world_size: int, minibatch_size: int) -> list[list[Update]]:
    """Return the updates of each process of a round whose rows have unequally many samples.

    Row p of the round is with process p % world_size, as loaders share it out. Seeds number the
    samples in the order of one process.
    """
    first = [sum(counts[:p]) for p in range(len(counts))]
    experiences = []
    for rank in range(world_size):
        rows = range(rank, len(counts), world_size)
        seeds = [first[p] + i for p in rows for i in range(counts[p])]
        whole = experience_of(sum(counts))
        part = whole.index(torch.tensor(seeds, dtype=torch.int64))
        own = [counts[p] for p in rows]
        experiences.append(Several(part.states, part.condition, part.seeds, counts=own))
    layouts = [layout(own, len(own.counts or ()), world_size) for own in experiences]
    return [
        plan(own, layouts, rank, 3, minibatch_size, 5, 2) for rank, own in enumerate(experiences)
    ]


ROUNDS = {
    "every row alike": [2] * 12,
    "some rows without any": [0, 3, 1, 0, 0, 4, 2, 1, 0, 1, 5, 0],
    "one row has all": [0] * 7 + [9] + [0] * 4,
    "rows that do not divide": [1, 2, 0, 3, 1],
    "nothing": [0] * 12,
}


@pytest.mark.parametrize("minibatch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("counts", ROUNDS.values(), ids=ROUNDS)
def test_minibatches_do_not_depend_on_the_number_of_processes(
    counts: list[int], minibatch_size: int
) -> None:
    (alone,) = shared(counts, 1, minibatch_size)
    without_terms = len(range(0, sum(counts), 4)) if minibatch_size == 1 else 0
    assert len(alone) == 3 * (-(-sum(counts) // minibatch_size) - without_terms)
    for world_size in (2, 3, 4):
        plans = shared(counts, world_size, minibatch_size)
        assert {len(updates) for updates in plans} == {len(alone)}
        for whole, *parts in zip(alone, *plans, strict=True):
            seeds = [seed for part in parts for seed in part.minibatch.seeds]
            assert sorted(seeds) == sorted(whole.minibatch.seeds)
            assert {part.total for part in parts} == {len(whole.minibatch)} == {whole.total}
            terms = sum(seed % 4 for seed in seeds)
            assert {part.total_terms for part in parts} == {terms} == {whole.total_terms}
            most = max(sum(seed % 4 for seed in part.minibatch.seeds) for part in parts)
            assert {part.most_terms for part in parts} == {most}
            for part in parts:
                # In the order that one process has them in, states beside their seeds.
                order = [s for s in whole.minibatch.seeds if s in part.minibatch.seeds]
                assert list(part.minibatch.seeds) == order
                assert tensor_of(part.minibatch.states["x"]).flatten().tolist() == order
        for updates in plans:
            own = {update.minibatch.num_terms for update in updates}
            assert {update.largest for update in updates} <= {max(own, default=0)}


def test_several_processes_have_to_know_how_many_samples_a_row_has() -> None:
    experience = experience_of(5)
    with pytest.raises(UsageError, match=r"5 samples for 4 conditions.*Experience\.counts"):
        layout(experience, 4, world_size=2)
    # One process has them in order anyway.
    assert len(plan(experience, [layout(experience, 4)], 0, 1, 2, 0, 0)) == 3


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
        update = Update(experience_of(total).index(rows), 0, total, total)
        given = (torch.Tensor.backward, [weight], microbatch_size, len(counts))
        logs.append(accumulate(update, loss, Passes(*given)))
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


def linear(weight: Tensor) -> Loss:
    """Return the loss w x, with nothing to log."""
    return lambda part, noise: (weight * tensor_of(part.states["x"])[:, 0], {})


def test_a_process_that_fails_makes_all_gradients_nan() -> None:
    """The others hear of it in the all-reduce that they wait in."""
    weight, calls = nn.Parameter(torch.tensor(2.0)), []

    def loss(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(len(part))
        if len(calls) == 2:
            raise UsageError("no")
        return weight * tensor_of(part.states["x"])[:, 0], {}

    update = Update(experience_of(5), 0, 9, 9)
    with pytest.raises(UsageError, match=r"^no$"):
        accumulate(update, loss, Passes(torch.Tensor.backward, [weight], 2, world_size=2))
    assert calls == [2, 2] and weight.grad is not None and weight.grad.isnan()


def test_an_error_of_a_backward_pass_makes_all_gradients_nan() -> None:
    """Memory mostly runs out there."""
    weight, passes = nn.Parameter(torch.tensor(2.0)), []

    def backward(total: Tensor) -> None:
        passes.append(float(total))
        if len(passes) == 2:
            raise torch.OutOfMemoryError("in the second one")
        total.backward()

    update = Update(experience_of(5), 0, 9, 9)
    with pytest.raises(torch.OutOfMemoryError, match="in the second one"):
        accumulate(update, linear(weight), Passes(backward, [weight], 2, world_size=2))
    assert len(passes) == 3 and weight.grad is not None and weight.grad.isnan()


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
def test_a_process_leaves_where_the_others_have_some_of_its_gradients(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its own cannot become NaN any more, or the others wait in the midst of a network."""
    weight, passes, left = nn.Parameter(torch.tensor(2.0)), [], []
    monkeypatch.setattr("lit_rlft.loop.updates.leave", left.append)

    def backward(total: Tensor) -> None:
        passes.append(float(total))
        raise RuntimeError(f"pass {len(passes)}")

    update = Update(experience_of(5), 0, 9, 9, most_terms=5)
    idle = (lambda: 0 * weight) if split else None
    with pytest.raises(RuntimeError, match="pass 1") as raised:
        accumulate(update, linear(weight), Passes(backward, [weight], 5, 2, idle=idle))
    assert left == [raised.value] and len(passes) == (1 if split else 2)


@pytest.mark.parametrize(
    ("last", "split", "automatic", "spoilt", "leaves"),
    [
        (False, False, False, True, False),  # the others wait in the next update's all-reduce
        (False, False, True, False, False),  # they gather in it
        (True, False, False, False, False),  # they gather after it
        (False, True, False, False, True),
        (True, True, False, False, True),
    ],
)
def test_an_error_between_updates_stops_the_others_where_they_wait(
    last: bool,
    split: bool,
    automatic: bool,
    spoilt: bool,
    leaves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, left = nn.Parameter(torch.tensor(2.0)), list[Exception]()
    monkeypatch.setattr("lit_rlft.loop.updates.leave", left.append)
    idle = (lambda: 0 * weight) if split else None
    update = Update(experience_of(2), 0, 2, 2, last=last)
    sizes = BatchSizes("auto" if automatic else 4, 64, {})
    given = (torch.Tensor.backward, [weight])
    with (
        pytest.raises(KeyError) as raised,
        finishing(update, Passes(*given, None, 2, idle=idle), sizes),
    ):
        raise KeyError("own")
    assert left == ([raised.value] if leaves else [])
    assert bool(weight.grad is not None and weight.grad.isnan()) == spoilt
    weight.grad = None
    with pytest.raises(KeyError), finishing(update, Passes(*given), sizes):
        raise KeyError("of one process")
    assert weight.grad is None


def test_the_last_update_of_a_round_is_known() -> None:
    """Also where a minibatch without a term would have been the last."""
    assert [update.last for update in planned(10, 2)] == [False] * 5 + [True]
    (updates,) = shared([4], 1, 1)
    assert len(updates) == 9 and [update.last for update in updates] == [False] * 8 + [True]


@pytest.mark.parametrize("microbatch_size", [None, 1, 2])
@pytest.mark.parametrize("own", [0, 1, 3])
def test_processes_with_parts_of_the_weights_make_equally_many_passes(
    own: int, microbatch_size: int | None
) -> None:
    """The one that has the most terms sets their number; the last one alone synchronises."""
    w = nn.Parameter(torch.ones(()))
    made: list[str] = []

    def loss(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        made.append("own")
        return tensor_of(part.states["x"])[:, 0] * w, {}

    def idle() -> Tensor:
        made.append("idle")
        return 0 * w

    @contextmanager
    def alone() -> Iterator[None]:
        made.append("alone")
        yield

    update = Update(experience_of(own), 0, 3 + own, 3 + own, most_terms=3)
    passes = Passes(lambda total: total.backward(), [w], microbatch_size, 2, alone, idle=idle)
    accumulate(update, loss, passes)
    needed = -(-3 // (microbatch_size or 3))
    of_own = -(-own // (microbatch_size or 3))
    assert made.count("own") == of_own and made.count("idle") == needed - of_own
    assert made.count("alone") == needed - 1
    assert w.grad is not None
    torch.testing.assert_close(float(w.grad), 2 * sum(range(own)) / (3 + own))
