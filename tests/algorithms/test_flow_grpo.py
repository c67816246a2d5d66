"""Flow-GRPO, MixGRPO, GRPO-Guard and RLOO: estimators, windows, refusals, what they learn."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.ddpo import rounds_by_batch
from lit_rlft.core.advantage import GroupAdvantage, LeaveOneOutAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.reward import WeightedSum
from lit_rlft.core.sampling import Sampler, walk
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.state import leaves, tensor_of
from lit_rlft.core.window import SlidingWindow
from lit_rlft.kit.saved_grids import Clip
from tests.algorithms.ddpo_support import (
    FLOW,
    MASKED,
    MIXED,
    NUM,
    PIPELINES,
    STEPS,
    M,
    Sum,
    Toy,
    collected,
    each_process,
    ends_of,
    gradient,
    pairs_of,
    replayed,
    tuner_of,
)
from tests.algorithms.test_ddpo_law import Shuffled, fitted, mean_reward, moved

SDE = {"sampler": Sampler(STEPS, 0.7, "flow_sde")}
GAUSSIAN = pytest.mark.parametrize(
    "make", [PIPELINES[name] for name in ("discrete VP", "flow")], ids=["VP", "flow"]
)
GUARD = {**SDE, "ratio_norm": True, "clip_range": 0.5}


@each_process
def test_first_ratios_are_one(make: Callable[[], Pipeline]) -> None:
    """On the equation's steps; masked states have none, mixed ones in their continuous part."""
    pipeline = make()
    if not pipeline.process.has_flow_steps:
        with pytest.raises(UsageError, match=r"transition must be eta for a MaskedProcess.*eta to"):
            tuner_of(pipeline, **SDE)
        return
    tuner = tuner_of(pipeline, **SDE)
    rollout = collected(tuner)
    assert replayed(tuner, rollout, NUM)[1] == 0
    assert tuner.algorithm != "Flow-GRPO"  # its advantages are over the batch here
    tuner.advantage = GroupAdvantage()
    assert tuner.algorithm == "Flow-GRPO"
    preserving = tuner_of(make(), sampler=Sampler(STEPS, 0.7, "cps"), advantage=GroupAdvantage())
    assert replayed(preserving, collected(preserving), NUM)[1] == 0
    assert preserving.algorithm == "Flow-CPS"


@GAUSSIAN
def test_only_the_windows_steps_have_noise_and_are_trained(make: Callable[[], Pipeline]) -> None:
    """The others are the deterministic sampler's to the last bit, as the evaluation's are."""
    sliding = SlidingWindow(size=1, interval=2)
    tuner = tuner_of(make(), **SDE, sliding=sliding, advantage=GroupAdvantage())
    assert tuner.algorithm == "MixGRPO" and tuner.route().eta == tuner.reference_route().eta == 0
    process = tuner.pipeline.process
    for tuner.num_rounds, first in enumerate((0, 0, 1, 1, 2, 2, 2)):
        rollout = collected(tuner)
        assert rollout.trajectories.steps == [first] and rollout.metrics["window"] == first
        assert rollout.num_terms == NUM and rollout.num_steps == 1
        (part,) = pairs_of(rollout)
        x_t, x_s = (tensor_of(part.states[name]) for name in ("x_t", "x_s"))
        # From pure noise to the window, and from there to data, without a draw.
        times = process.times(STEPS)
        with torch.no_grad():
            start = tuner.rollouts.draw(tuner.route(), rollout.condition, rollout.seeds, keep=[0])
            args = (rollout.condition, times[: first + 1], 0.0)
            *_, (_, before) = walk(tuner.pipeline, process, start[0], *args)
            args = (rollout.condition, times[first + 1 :], 0.0)
            *_, (_, x_0) = walk(tuner.pipeline, process, x_s, *args)
            rewards = tuner.reward(x_0, rollout.condition)
        assert torch.equal(tensor_of(before), x_t)
        assert float(rewards.mean()) == pytest.approx(rollout.metrics["reward"], abs=1e-6)
        assert replayed(tuner, rollout, NUM)[1] == 0


@GAUSSIAN
def test_candidates_of_a_condition_may_start_from_one_noise(make: Callable[[], Pipeline]) -> None:
    """That of the first; the noise of the steps is each one's own, in chunks of any size."""

    def states(size: int, **settings: Any) -> tuple[Tensor, Tensor]:
        rollout = collected(tuner_of(make(), sampling_batch_size=size, **settings))
        rows = rollout.terms(torch.arange(NUM)).states  # of the first trained step
        return tensor_of(rows["x_t"]), tensor_of(rows["x_s"])

    settings: dict[str, Any] = {**SDE, "window": (0, 1)}
    (x_1, after), (own, own_after) = states(64, **settings, same_start=True), states(64, **settings)
    groups, apart = x_1.view(NUM // M, M, -1), own.view(NUM // M, M, -1)
    assert torch.equal(groups, apart[:, :1].expand_as(groups))
    assert torch.equal(after.view_as(groups)[:, 0], own_after.view_as(groups)[:, 0])
    assert len({tuple(row.tolist()) for row in groups[:, 0]}) == NUM // M
    assert len({tuple(row.tolist()) for row in after}) == NUM
    start, later = states(3, **settings, same_start=True)
    assert torch.equal(start, x_1)
    torch.testing.assert_close(later, after)  # a network rounds by the size of its batch


@GAUSSIAN
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_guarded_log_ratios_are_the_projected_noise(make: Any, reduction: Any) -> None:
    """Delta . z for every pair, for every std of the step: mean 0 and no std in it."""
    tuner = tuner_of(make().double(), **GUARD, log_prob_reduction=reduction)
    rollout = collected(tuner)
    before = {name: value.clone() for name, value in tuner.trainable().state_dict().items()}
    (part,) = pairs_of(rollout)

    def means() -> tuple[Tensor, Tensor]:
        states = part.states
        with torch.no_grad():
            p = tuner.pipeline(states["x_t"], tensor_of(states["t"]), part.condition)
            law: Any = tuner.pipeline.process.step(p, states["x_t"], states["coefficients"])
        return law.loc, law.std

    old, std = means()
    torch.testing.assert_close(tensor_of(part.states["mean"]), old)
    z = (tensor_of(part.states["x_s"]) - old) / std
    moved(tuner)
    drift = means()[0] - old
    expected = getattr(drift * z, reduction)(dim=1)
    _, values = tuner.loss(part, None)
    torch.testing.assert_close(values["ratio"].log(), expected, rtol=1e-6, atol=1e-9)
    assert expected.abs().min() > 1e-8
    tuner.trainable().load_state_dict(before)
    assert replayed(tuner, rollout)[1] < 1e-12


@GAUSSIAN
@pytest.mark.parametrize("transition", ["flow_sde", "cps"])
def test_guarded_steps_pull_predictions_alike(make: Any, transition: Any) -> None:
    """The surrogate's gradient in a prediction is A z / D at every step, up to one factor."""
    sampler = Sampler(STEPS, 0.7, transition)
    tuner = tuner_of(make().double(), **GUARD | {"sampler": sampler})
    rollout = collected(tuner)
    assert rollout.balance is not None and rollout.trajectories.steps == [0, 1, 2, 3]
    assert rollout.balance[-1] == 0 and float(rollout.balance[:-1].mean()) == pytest.approx(1)
    seen: list[Tensor] = []

    def kept(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = tuner.pipeline.denoiser.register_forward_hook(kept)
    (part,) = pairs_of(rollout)
    losses, _ = tuner.loss(part, None)
    losses.sum().backward()
    handle.remove()
    law: Any = tuner._transition(tuner.pipeline, part)
    z = ((tensor_of(part.states["x_s"]) - law.loc) / law.std).detach()
    advantage, found = tensor_of(part.states["advantage"]).unsqueeze(1), seen[-1].grad
    assert found is not None
    factors = found / (advantage * z)
    torch.testing.assert_close(factors.abs(), factors.abs()[:1, :1].expand_as(factors))
    # On the flow this is the published weight of the equation's steps, 1 / (t - s).
    if isinstance(tuner.pipeline, Toy) and transition == "flow_sde":
        t = tensor_of(part.states["t"])
        lengths = t - ends_of(tuner, t)
        weights = tensor_of(part.states["balance"]) * lengths
        later = t < 1
        torch.testing.assert_close(weights[later], weights[later][:1].expand(int(later.sum())))


def test_the_kl_of_guarded_steps_counts_alike() -> None:
    """The balance is the surrogate's: it would scale the KL, which has the steps' std in it."""
    tuner = tuner_of(Toy(FLOW).double(), **GUARD, kl_coef=0.7)
    (part,) = pairs_of(collected(moved(tuner)))
    losses, values = tuner.loss(part, None)
    tuner.kl_coef = 0
    free, _ = tuner.loss(part, None)
    weight = tensor_of(part.states["weight"])
    torch.testing.assert_close(losses - free, 0.7 * values["reference_kl"] * weight)
    assert tensor_of(part.states["balance"]).unique().numel() > 1


@GAUSSIAN
@pytest.mark.parametrize("sampler", [Sampler(STEPS, 1.0), SDE["sampler"]])
def test_steps_without_noise_are_not_drawn(make: Any, sampler: Sampler) -> None:
    """The last step of all has none: a round that drew it alone could train nothing."""
    for window, noisy in ((None, {0, 1, 2}), ((STEPS - 2, STEPS), {STEPS - 2})):
        tuner = tuner_of(make(), sampler=sampler, num_train_steps=1, window=window)
        drawn = set()
        for tuner.num_rounds in range(20):
            drawn |= set(collected(tuner).trajectories.steps)
        assert drawn == noisy


@pytest.mark.parametrize("kind", [MASKED, MIXED])
def test_steps_of_masks_all_leave_something_to_chance(kind: Any) -> None:
    tuner = tuner_of(Toy(kind), num_train_steps=1)
    drawn = set()
    for tuner.num_rounds in range(30):
        drawn |= set(collected(tuner).trajectories.steps)
    assert drawn == set(range(STEPS))


@GAUSSIAN
@pytest.mark.parametrize("settings", [{"num_train_steps": 1}, {"sliding": SlidingWindow(2)}])
def test_a_guarded_step_has_one_weight_whichever_are_trained(
    make: Any, settings: dict[str, Any]
) -> None:
    whole = collected(tuner_of(make().double(), **GUARD)).balance
    some = collected(tuner_of(make().double(), **GUARD, **settings))
    assert whole is not None and some.balance is not None
    torch.testing.assert_close(some.balance, whole[some.trajectories.steps])


@pytest.mark.parametrize(
    ("matmul", "convolutions", "rounds"),
    [("highest", False, False), ("high", False, True), ("highest", True, True)],
)
def test_tf32_rounds_by_batch_on_a_gpu_alone(
    matmul: str, convolutions: bool, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        assert rounds_by_batch(torch.float32, "cuda") is rounds
        assert not rounds_by_batch(torch.float32, "cpu")
        assert rounds_by_batch(torch.bfloat16, "cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_guarded_ratios_survive_half_precision_replay() -> None:
    with pytest.warns(UserWarning, match="was loaded in bfloat16"):
        tuner = tuner_of(Toy(FLOW).bfloat16(), **GUARD, state_dtype="bfloat16")
    assert replayed(tuner, collected(tuner))[1] < 1e-4


@pytest.mark.parametrize("sampler", [Sampler(STEPS, 0.7, "flow_sde"), Sampler(STEPS, 1.0)], ids=str)
def test_gradients_do_not_depend_on_chunks(sampler: Sampler) -> None:
    tuner = tuner_of(Toy(FLOW).double(), **{**GUARD, "sampler": sampler}, kl_coef=0.1)
    rollout = collected(moved(tuner, 0.01))
    moved(tuner, 0.01)
    serial, _ = replayed(tuner, rollout, 1)
    for size in (None, 7, NUM):
        torch.testing.assert_close(replayed(tuner, rollout, size)[0], serial, rtol=1e-4, atol=1e-7)


def test_leave_one_out_is_unbiased() -> None:
    """By enumeration of all groups of a policy over three actions; the group's mean is not.

    With its own reward in the baseline the gradient is (M - 1) / M of the right one.
    """
    logits = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    probabilities = logits.softmax(0)
    (exact,) = torch.autograd.grad((probabilities * values).sum(), logits, retain_graph=True)
    scores = torch.eye(3, dtype=torch.float64) - probabilities.detach()  # of log-probabilities
    for m in (2, 3):
        groups = torch.tensor([*itertools.product(range(3), repeat=m)])
        weight = probabilities.detach()[groups].prod(dim=1)
        rewards = values[groups]
        names = [str(i) for i in range(len(groups))]
        shares = {
            1.0: LeaveOneOutAdvantage()(rewards, names),
            (m - 1) / m: rewards - rewards.mean(dim=1, keepdim=True),
        }
        for share, advantages in shares.items():
            terms = (advantages.unsqueeze(-1) * scores[groups]).mean(dim=1)
            found = (weight.unsqueeze(1) * terms).sum(dim=0)
            torch.testing.assert_close(found, share * exact, rtol=1e-12, atol=1e-12)


def test_leave_one_out_leaves_out_what_failed() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [math.nan, 2.0, 6.0], [math.nan, -math.inf, 3.0]])
    found = LeaveOneOutAdvantage()(rewards, ["a", "b", "c"])
    assert found.tolist() == [[-3.0, -1.5, 4.5], [0.0, -4.0, 4.0], [0.0, 0.0, 0.0]]
    clipped = LeaveOneOutAdvantage()(rewards, ["a", "b", "c"], 2.0)
    assert clipped[0].tolist() == [-2.0, -1.5, 2.0]
    equal = torch.full((1, 3), 0.1, dtype=torch.float64)  # whose mean is another number
    assert not LeaveOneOutAdvantage()(equal, ["a"]).any()
    with pytest.raises(UsageError, match="a group of one has no peers"):
        tuner_of(advantage=LeaveOneOutAdvantage(), num_candidates=1)
    assert tuner_of(advantage=LeaveOneOutAdvantage()).algorithm == "RLOO"


def clipped_pipeline() -> Pipeline:
    pipeline = GaussianMixturePipeline(residual_width=16)
    pipeline.process = pipeline.denoiser.process = GaussianProcess(
        DiscreteVP(vp_betas()), bound=Clip(1.0)
    )
    return pipeline


WRONG: dict[str, tuple[Callable[[], Pipeline], dict[str, Any], str]] = {
    "window and sliding": (
        PIPELINES["flow"],
        {"window": (0, 2), "sliding": SlidingWindow(2)},
        "window must be null beside sliding",
    ),
    "large window": (PIPELINES["flow"], {"sliding": SlidingWindow(4)}, "size must be at most 3"),
    "one step": (
        PIPELINES["flow"],
        {"sampler": Sampler(1, 0.7, "flow_sde"), "sliding": SlidingWindow(1)},
        "Sampler: num_steps must be at least 2 beside sliding",
    ),
    "narrow share": (
        PIPELINES["flow"],
        {"sliding": SlidingWindow(3, order="random", until=0.5)},
        r"until must be at least 0.75, the share of its 3 of 4 steps",
    ),
    "many steps": (
        PIPELINES["flow"],
        {"sliding": SlidingWindow(2), "num_train_steps": 3},
        "the window's 2 steps",
    ),
    "masked": (
        lambda: Toy(MASKED),
        {"sampler": Sampler(STEPS, 1.0), "sliding": SlidingWindow(2)},
        "sliding must be null for a MaskedProcess.*take the config",
    ),
    "mixed": (
        lambda: Toy(MIXED),
        {"sliding": SlidingWindow(2)},
        "sliding must be null for a ProductProcess.*flow_grpo for mixed states",
    ),
    "one start for masks": (
        lambda: Toy(MASKED),
        {"sampler": Sampler(STEPS, 1.0), "same_start": True},
        "same_start must be false for masked states",
    ),
    "one start for one": (
        PIPELINES["flow"],
        {"same_start": True, "num_candidates": 1},
        "same_start must be false with one candidate",
    ),
    "mixed ratios": (
        lambda: Toy(MIXED),
        {"ratio_norm": True},
        "ratio_norm must be false for a ProductProcess",
    ),
    "clipped": (
        clipped_pipeline,
        {"ratio_norm": True},
        "ratio_norm must be false where steps clip",
    ),
    "leave one out of each part": (
        PIPELINES["flow"],
        {
            "decoupled_rewards": True,
            "advantage": LeaveOneOutAdvantage(),
            "reward": WeightedSum({"a": Sum(), "b": Sum()}),
        },
        "decoupled_rewards must be false beside LeaveOneOutAdvantage.*GroupAdvantage",
    ),
    "no ratios": (
        PIPELINES["flow"],
        {"ratio_norm": True, "estimator": "score_function"},
        "estimator must be importance_sampling",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_bad_settings(mistake: str) -> None:
    make, settings, sentence = WRONG[mistake]
    with pytest.raises(UsageError, match=sentence):
        tuner_of(make(), **{**SDE, **settings})


def test_windows_are_at_least_one_step() -> None:
    for name in ("size", "interval", "stride"):
        with pytest.raises(UsageError, match=f"SlidingWindow: {name} must be at least 1"):
            SlidingWindow(**{name: 0})
    with pytest.raises(UsageError, match="stride must be 1 with order random"):
        SlidingWindow(order="random", stride=2)
    with pytest.raises(UsageError, match="until must be in"):
        SlidingWindow(until=1.5)


def test_mixed_states_take_the_equation() -> None:
    tuner = tuner_of(Toy(MIXED), **SDE)
    rollout = collected(tuner)
    (part,) = pairs_of(rollout)
    assert all(leaf.isfinite().all() for leaf in leaves(part.states["x_s"]))
    assert gradient(tuner, tuner.loss(part, None)[0]).isfinite().all()


LEARNERS: dict[str, dict[str, Any]] = {
    "Flow-GRPO": {"sampler": Sampler(8, 0.7, "flow_sde")},
    "MixGRPO": {
        "sampler": Sampler(8, 0.7, "flow_sde"),
        "sliding": SlidingWindow(size=3, interval=5),
    },
    "Flow-CPS": {"sampler": Sampler(8, 0.7, "cps")},
    "Flow-GRPO-Fast": {
        "sampler": Sampler(8, 0.7, "flow_sde"),
        "sliding": SlidingWindow(size=2, interval=1, order="random"),
    },
    "GRPO-Guard": {"sampler": Sampler(8, 0.7, "flow_sde"), "ratio_norm": True},
    "RLOO": {"advantage": LeaveOneOutAdvantage()},
}


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_learns_and_its_control_does_not(learner: str, tmp_path: Path) -> None:
    settings = {"advantage": GroupAdvantage(), **LEARNERS[learner]}
    learned = mean_reward(fitted(tmp_path, **settings))
    control = mean_reward(fitted(tmp_path, **{**settings, "advantage": Shuffled()}))
    print(learner, learned, control)
    assert learned > -1.0 and control < -2.2
