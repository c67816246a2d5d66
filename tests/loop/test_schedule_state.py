"""A resumed run has the schedule of its own settings, at the place that the run before it reached.

Every rate is compared with its closed form at that number of updates.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from lit_rlft.core.checks import UsageError
from lit_rlft.loop import resume
from lit_rlft.optimizers import MuonAdamW

BEFORE, AFTER, RATE = 20, 60, 0.1
Make = Callable[[Optimizer], Any]
Form = Callable[[int], float]
Run = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines that are logged about a resumed run."""
    lines: list[str] = []
    monkeypatch.setattr("lit_rlft.loop.resume.rank_zero_info", lines.append)
    return lines


def adamw(rate: float = RATE) -> Optimizer:
    return AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate)


def saved(optimizer: Optimizer, schedule: Any) -> dict[str, Any]:
    """Return both in a checkpoint, as a file has them."""
    states = [] if schedule is None else [schedule.state_dict()]
    file = io.BytesIO()
    torch.save({"optimizer_states": [optimizer.state_dict()], "lr_schedulers": states}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run: Run, own: Optimizer, make: Make, *, named: bool = True) -> tuple[Optimizer, Any]:
    """Return optimiser and schedule of a resumed run.

    Args:
        run: Settings and checkpoint of the run before it.
        own: A fresh optimiser.
        make: Makes the schedule.
        named: Whether the run's settings name more than classes and the rate.
    """
    old, checkpoint = run
    if not named:
        old = {key: old[key] for key in ("model.optimizer", "model.lr_scheduler")}
    shown = copy.deepcopy(own)
    schedule = make(shown)
    new = resume.optimizer_settings(shown, schedule, make)
    resume.check_optimizer(checkpoint, old, shown, schedule)
    resume.list_changes(checkpoint, old, new, shown, schedule)
    schedule = make(own)
    own.load_state_dict(checkpoint["optimizer_states"][0])
    schedule.load_state_dict(copy.deepcopy(checkpoint["lr_schedulers"][0]))
    return own, schedule


def steps(optimizer: Optimizer, schedule: LRScheduler, count: int) -> Iterator[dict[str, Any]]:
    """Iterate over the settings of the first group before each of some updates."""
    for _ in range(count):
        yield dict(optimizer.param_groups[0])
        optimizer.step()
        schedule.step()


def one_cycle(peak: float, total: int, start: float) -> Form:
    def rate(n: int) -> float:
        up = start * total - 1
        if n <= up:
            return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * n / up)) / 2
        done = (n - up) / (total - 1 - up)
        end = peak / 25 / 1e4
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2

    return rate


def triangle(low: float, high: float, up: int) -> Form:
    return lambda n: low + (high - low) * (1 - abs(n % (2 * up) - up) / up)


def linear(total: int) -> Form:
    return lambda n: RATE * (0.5 + 0.5 * min(n, total) / total)


def cosine(total: int, least: float = 0.0) -> Form:
    return lambda n: least + (RATE - least) * (1 + math.cos(math.pi * n / total)) / 2


def warm_up(until: int, warm: int = 10) -> Make:
    def make(optimizer: Optimizer) -> LRScheduler:
        first = LinearLR(optimizer, 0.5, total_iters=warm)
        return SequentialLR(optimizer, [first, MultiStepLR(optimizer, [5])], [until])

    return make


def after_warm_up(until: int, warm: int = 10) -> Form:
    def rate(n: int) -> float:
        return linear(warm)(n) if n < until else RATE * (0.1 if n - until >= 5 else 1.0)

    return rate


def chained(factor: float) -> Make:
    return lambda optimizer: ChainedScheduler(
        [ConstantLR(optimizer, factor, 30), MultiStepLR(optimizer, [50])]
    )


def after_chain(factor: float) -> Form:
    return lambda n: RATE * (factor if n < 30 else 1.0) * (0.1 if n >= 50 else 1.0)


def milestones(*places: int) -> Form:
    return lambda n: RATE * 0.1 ** sum(n >= place for place in places)


CASES: list[tuple[str, Make, Make, Form, str]] = [
    (
        "longer cycle",
        partial(OneCycleLR, max_lr=1.0, total_steps=64),
        partial(OneCycleLR, max_lr=1.0, total_steps=128),
        one_cycle(1.0, 128, 0.3),
        "model.lr_scheduler.total_steps 64 -> 128",
    ),
    (
        "other peak",
        partial(OneCycleLR, max_lr=1.0, total_steps=128),
        partial(OneCycleLR, max_lr=3.0, total_steps=128, pct_start=0.5),
        one_cycle(3.0, 128, 0.5),
        "model.lr_scheduler.max_lr 1.0 -> 3.0, model.lr_scheduler.pct_start 0.3 -> 0.5",
    ),
    (
        "milestones",
        partial(MultiStepLR, milestones=[1000]),
        partial(MultiStepLR, milestones=[70]),
        milestones(70),
        "model.lr_scheduler.milestones.0 1000 -> 70",
    ),
    (
        "passed milestone",
        lambda optimizer: MultiStepLR(optimizer, [10, 70]),
        lambda optimizer: MultiStepLR(optimizer, [40]),
        milestones(40),
        "model.lr_scheduler.milestones.0 10 -> 40, model.lr_scheduler.milestones.1 70 -> not set",
    ),
    (
        "cosine",
        partial(CosineAnnealingLR, T_max=50, eta_min=0.01),
        partial(CosineAnnealingLR, T_max=100, eta_min=0.02),
        cosine(100, 0.02),
        "model.lr_scheduler.T_max 50 -> 100, model.lr_scheduler.eta_min 0.01 -> 0.02",
    ),
    (
        "linear",
        partial(LinearLR, start_factor=0.1, total_iters=40),
        partial(LinearLR, start_factor=0.5, total_iters=60),
        linear(60),
        "model.lr_scheduler.start_factor 0.1 -> 0.5, model.lr_scheduler.total_iters 40 -> 60",
    ),
    (
        "stages",
        warm_up(10),
        warm_up(30),
        after_warm_up(30),
        "model.lr_scheduler.milestones.0 10 ->",
    ),
    (
        "stage",
        warm_up(40),
        warm_up(40, 30),
        after_warm_up(40, 30),
        "model.lr_scheduler.schedulers.0.total_iters 10 -> 30",
    ),
    (
        "chain",
        chained(0.5),
        chained(0.2),
        after_chain(0.2),
        "model.lr_scheduler.schedulers.0.factor 0.5 -> 0.2",
    ),
    (
        "triangle",
        partial(CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=10),
        partial(CyclicLR, base_lr=0.2, max_lr=2.0, step_size_up=25),
        triangle(0.2, 2.0, 25),
        "model.lr_scheduler.base_lr 0.1 -> 0.2, model.lr_scheduler.max_lr 1.0 -> 2.0, "
        "model.lr_scheduler.step_size_up 10 -> 25",
    ),
    (
        "function",
        lambda optimizer: LambdaLR(optimizer, lambda n: 1 / (n + 1)),
        lambda optimizer: LambdaLR(optimizer, lambda n: 1 / (n + 10)),
        lambda n: RATE / (n + 10),
        "model.lr_scheduler.rate 0.00476",
    ),
    (
        "factors",
        lambda optimizer: MultiplicativeLR(optimizer, lambda n: 0.9),
        lambda optimizer: MultiplicativeLR(optimizer, lambda n: 0.99),
        lambda n: RATE * 0.99**n,
        "model.lr_scheduler.rate",
    ),
]


def trained(make: Make, optimizer: Optimizer) -> Run:
    schedule = make(optimizer)
    assert len([*steps(optimizer, schedule, BEFORE)]) == BEFORE
    return resume.optimizer_settings(optimizer, schedule, make), saved(optimizer, schedule)


@pytest.mark.parametrize("named", [True, False], ids=["named", "earlier version"])
@pytest.mark.parametrize(
    ("old", "new", "form", "line"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_changed_schedule_is_listed_and_applies(
    old: Make, new: Make, form: Form, line: str, named: bool, said: list[str]
) -> None:
    run = trained(old, adamw())
    own, schedule = resumed(run, adamw(), new, named=named)
    found = [group["lr"] for group in steps(own, schedule, AFTER)]
    assert found == pytest.approx([form(n) for n in range(BEFORE, BEFORE + AFTER)], rel=1e-6)
    (told,) = said
    if named:
        assert line in told
    else:
        assert "model.lr_scheduler." in told


@pytest.mark.parametrize("make", [c[1] for c in CASES], ids=[c[0] for c in CASES])
def test_an_unchanged_schedule_goes_on_bit_for_bit(make: Make, said: list[str]) -> None:
    run = trained(make, adamw())
    before = repr(run[1])
    for named in (True, False):
        resumed(run, adamw(), make, named=named)
        assert repr(run[1]) == before
    assert said == []


def test_milestones_as_earlier_versions_named_them_are_no_change(said: list[str]) -> None:
    """They counted how often each step is one."""
    make = partial(MultiStepLR, milestones=[1, 5])
    old, checkpoint = trained(make, adamw())
    earlier = {key: value for key, value in old.items() if ".milestones." not in key}
    earlier |= {"model.lr_scheduler.milestones.1": 1, "model.lr_scheduler.milestones.5": 1}
    resumed((earlier, checkpoint), adamw(), make)
    assert said == []


def slower(step: int) -> float:
    return 1.0 if step < 50 else 0.5


def slowest(step: int) -> float:
    return 1.0 if step < 50 else 0.1


def test_functions_of_other_names_are_listed_before_they_differ(said: list[str]) -> None:
    run = trained(partial(LambdaLR, lr_lambda=slower), adamw())
    own, schedule = resumed(run, adamw(), partial(LambdaLR, lr_lambda=slowest))
    assert "model.lr_scheduler.lr_lambda slower -> slowest" in said[0]
    found = [group["lr"] for group in steps(own, schedule, AFTER)]
    assert found == pytest.approx([RATE * slowest(n) for n in range(BEFORE, BEFORE + AFTER)])


def test_another_kind_of_stage_is_listed_and_applies(said: list[str]) -> None:
    def make(optimizer: Optimizer, last: Make) -> LRScheduler:
        return SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 30), last(optimizer)], [40])

    then = partial(CosineAnnealingLR, T_max=50)
    run = trained(partial(make, last=partial(LinearLR, total_iters=9)), adamw())
    own, schedule = resumed(run, adamw(), partial(make, last=then))
    found = [group["lr"] for group in steps(own, schedule, AFTER)]
    assert found[20:] == pytest.approx([cosine(50)(n) for n in range(AFTER - 20)])
    assert "model.lr_scheduler.schedulers.1 LinearLR -> CosineAnnealingLR" in said[0]


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda peak: partial(OneCycleLR, max_lr=peak, total_steps=128), ("betas", "max_lr")),
        (lambda peak: partial(CyclicLR, base_lr=0.1, max_lr=peak), ("betas", "base_momentum")),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_momenta_that_a_schedule_moves_are_those_of_the_new_one(
    make: Any, fields: tuple[str, ...]
) -> None:
    """A change of other betas, beside the first one that is moved, applies too."""
    new, base = make(2.0), partial(make(2.0), base_momentum=0.5)
    run = trained(make(1.0), adamw())
    fresh = AdamW([torch.nn.Parameter(torch.ones(1))], lr=RATE, betas=(0.8, 0.9))
    own, schedule = resumed(run, copy.deepcopy(fresh), base)
    twin = base(fresh)
    expected = [*steps(fresh, twin, BEFORE + AFTER)][BEFORE:]
    for now, known in zip(steps(own, schedule, AFTER), expected, strict=True):
        for name in ("lr", "initial_lr", *fields):
            assert now[name] == pytest.approx(known[name]), name
    still = partial(new, cycle_momentum=False)
    own, _ = resumed(trained(make(1.0), adamw()), adamw(), still)
    assert own.param_groups[0]["betas"] == (0.9, 0.999)


def test_another_rate_scales_no_other_constant(said: list[str]) -> None:
    """The rate of a cosine ends at its least one, from any first one."""
    make = partial(CosineAnnealingLR, T_max=100, eta_min=0.02)
    own, schedule = resumed(trained(make, adamw(0.05)), adamw(), make)
    found = [group["lr"] for group in steps(own, schedule, AFTER)]
    assert found == pytest.approx([cosine(100, 0.02)(n) for n in range(BEFORE, BEFORE + AFTER)])
    assert said == ["resuming with other settings: model.optimizer.lr 0.05 -> 0.1"]


def test_a_plateau_keeps_what_it_saw_and_waits_as_it_is_told_now(said: list[str]) -> None:
    def train(schedule: ReduceLROnPlateau, count: int) -> list[float]:
        rates = []
        for _ in range(count):
            schedule.step(1.0)
            rates.append(schedule.optimizer.param_groups[0]["lr"])
        return rates

    old = partial(ReduceLROnPlateau, monitor="train/loss", factor=0.5, patience=3, min_lr=0.01)
    optimizer = adamw()
    schedule = old(optimizer)
    assert train(schedule, 7) == [0.1] * 4 + [0.05] * 3  # and two of four rounds that are too bad
    named = resume.optimizer_settings(optimizer, schedule, old)
    run = named, saved(optimizer, schedule)
    new = partial(ReduceLROnPlateau, monitor="train/loss", factor=0.1, patience=2, min_lr=0.002)
    own, schedule = resumed(run, adamw(), new)
    assert (schedule.best, schedule.num_bad_epochs, schedule.last_epoch) == (1.0, 2, 7)
    assert train(schedule, 4) == pytest.approx([0.005] * 3 + [0.002])
    assert [name in said[0] for name in ("factor 0.5 -> 0.1", "min_lr 0.01 -> 0.002")] == [True] * 2
    # Neither the best of another value counts, nor a rate below the least one.
    other = partial(ReduceLROnPlateau, monitor="train/reward", mode="max", min_lr=0.07)
    own, schedule = resumed((named, saved(optimizer, schedule)), adamw(), other)
    assert schedule.best == -math.inf and own.param_groups[0]["lr"] == 0.07


def test_a_schedule_that_is_over_is_refused() -> None:
    run = trained(partial(OneCycleLR, max_lr=1.0, total_steps=64), adamw())
    ended = partial(OneCycleLR, max_lr=1.0, total_steps=10)
    with pytest.raises(UsageError, match=r"lr_scheduler\.init_args: the run has taken 20 updates"):
        resumed(run, adamw(), ended)


def test_a_momentum_that_is_moved_belongs_to_any_optimiser() -> None:
    def sgd() -> Optimizer:
        return SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE, momentum=0.9)

    run = trained(partial(CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=10), sgd())
    new = partial(CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=40)
    own, schedule = resumed(run, sgd(), new)
    assert own.param_groups[0]["momentum"] == pytest.approx(0.85)  # half way down, to 0.8
    assert len([*steps(own, schedule, AFTER)]) == AFTER


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9")
def test_momentum_and_betas_of_muon_and_adamw(said: list[str]) -> None:
    def make(**settings: Any) -> MuonAdamW:
        return MuonAdamW([torch.nn.Parameter(torch.ones(*s)) for s in ((20, 20), (3,))], **settings)

    old, new = make(), make(momentum=0.5, betas=(0.8, 0.9))
    checkpoint, named = saved(old, None), resume.optimizer_settings(old, None)
    earlier = {key: v for key, v in named.items() if key.split(".")[2:] < ["momentum"]}
    earlier = {k: v for k, v in earlier.items() if "betas" not in k}
    same = resume.optimizer_settings(make(), None)
    for before in (named, earlier):
        resume.list_changes(checkpoint, before, same, make(), None)
    assert said == [] and "model.optimizer.lr" in earlier
    resume.list_changes(checkpoint, earlier, resume.optimizer_settings(new, None), new, None)
    assert "model.optimizer.momentum 0.95 -> 0.5" in said[0] and "betas.1 0.98 -> 0.9" in said[0]
    new.load_state_dict(checkpoint["optimizer_states"][0])
    assert [part.param_groups[0].get("momentum") for part in new.parts] == [0.5, None]
    assert new.parts[1].param_groups[0]["betas"] == (0.8, 0.9)
