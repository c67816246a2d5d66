r"""DDPO against quadrature, torch.distributions and plain loops, on every kind of process.

The gradient of E[r] has no free parameters on a mixture in one dimension: the law of x is carried
from step to step by the transitions on a grid, :math:`p_s(y) = \int p_t(x)\, N(y; \mu_\theta(x),
std^2)\, dx`, and differentiated.
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

import lit_rlft.core.trajectory
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft.algorithms.base import Experience
from lit_rlft.algorithms.ddpo import DDPO, Rollout
from lit_rlft.core.advantage import Advantage, BatchAdvantage, GroupAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process, ProductProcess
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, RectifiedFlow, vp_betas
from lit_rlft.core.state import State, leaves, tensor_of
from tests.support import trainer_of

STEPS, CLASSES, PLACES = 4, 5, 12
CENTER = (0.75, -0.5)
FLOW, MASKED = GaussianProcess(RectifiedFlow(), "velocity"), MaskedProcess(CLASSES)
MIXED = ProductProcess({"box": FLOW, "category": MASKED})


class ToyDenoiser(nn.Module):
    """Predicts velocities [B, PLACES], logits [B, PLACES, CLASSES], or both, from all it sees."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.hidden = nn.Linear((CLASSES + 2) * PLACES + 1, 32)
        self.velocity, self.logits = nn.Linear(32, PLACES), nn.Linear(32, PLACES * CLASSES)

    def forward(self, x_t: State, t: Tensor) -> State:
        x = x_t if isinstance(x_t, dict) else {self.only: x_t}
        size, like = len(t), self.hidden.weight
        box = x.get("box", torch.zeros(size, PLACES))
        category = x.get("category", torch.zeros(size, PLACES, dtype=torch.int64))
        shown = nn.functional.one_hot(category, CLASSES + 1).flatten(1)
        seen = torch.cat([part.to(like) for part in (box, shown, t.unsqueeze(1))], dim=1)
        h = self.hidden(seen).tanh()
        out = {"box": self.velocity(h), "category": self.logits(h).view(size, PLACES, CLASSES)}
        return out if isinstance(x_t, dict) else out[self.only]

    @property
    def only(self) -> str:
        return "box" if isinstance(self.process, GaussianProcess) else "category"


class Toy(Pipeline):
    """States are samples; there are two conditions, told apart by nothing but their names."""

    name, device = "toy", torch.device("cpu")

    def __init__(self, process: Process) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = ToyDenoiser(process)
        self.process = process

    def encode(self, batch: Batch) -> Condition:
        return Condition([{"name": "a"}, {"name": "b"}], {}, batch["index"] % 2)

    def blank(self, condition: Condition) -> State:
        dtype = self.denoiser.hidden.weight.dtype
        box = torch.empty(len(condition), PLACES, dtype=dtype)
        both: State = {"box": box, "category": torch.zeros(box.shape, dtype=torch.int64)}
        return both if isinstance(self.process, ProductProcess) else both[self.denoiser.only]

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        return self.denoiser(x_t, t)

    def decode(self, x_0: State, condition: Condition) -> Any:
        return x_0

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return torch.zeros(len(condition), 3, 8, 8)


class Sum(Reward):
    """A different weight for every dimension of every field."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        parts = [leaf.flatten(1).float() for leaf in leaves(samples)]
        values = torch.cat(parts, dim=1)
        return values @ torch.linspace(0.1, 1.3, values.shape[1])


class Raw(Advantage):
    """Rewards as they are, less a constant, which keeps the estimator unbiased."""

    def __init__(self, baseline: float = 0.0) -> None:
        self.baseline = baseline

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        raise NotImplementedError

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        return rewards.double() - self.baseline


class Shuffled(BatchAdvantage):
    """The control: advantages of other samples."""

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        advantages = super().__call__(rewards, conditions, clip)
        order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(0))
        return advantages.flatten()[order].view(rewards.shape)


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "discrete VP": lambda: GaussianMixturePipeline(residual_width=16),
    "cosine VP": lambda: GaussianMixturePipeline(schedule="cosine_vp", prediction_type="v"),
    "flow": lambda: Toy(FLOW),
    "masked": lambda: Toy(MASKED),
    "product": lambda: Toy(MIXED),
}
each_process = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
NUM, M = 8, 2


def tuner_of(pipeline: Pipeline | None = None, *, setup: bool = True, **settings: Any) -> DDPO:
    pipeline = pipeline or GaussianMixturePipeline(residual_width=16)
    gaussian = isinstance(pipeline, GaussianMixturePipeline)
    reward = settings.pop("reward", Coordinate() if gaussian else Sum())
    base = {"sampler": Sampler(STEPS, 1.0), "num_candidates": M, "advantage": BatchAdvantage()}
    tuner = DDPO(pipeline, reward, **{**base, **settings})
    # As much of a trainer as `collect` looks at.
    trainer: Any = SimpleNamespace(world_size=1, progress_bar_callback=None, is_global_zero=True)
    tuner.trainer = trainer
    if setup:
        tuner.setup("fit")
    return tuner


@torch.no_grad()
def collected(tuner: DDPO, num_conditions: int = NUM // M) -> Rollout:
    batch = {"index": torch.arange(num_conditions)}
    return tuner.collect(batch, tuner.pipeline.encode(batch))


def pairs_of(rollout: Rollout, size: int | None = None) -> list[Experience]:
    return [rollout.terms(rows) for rows in torch.arange(rollout.num_terms).split(size or 10**6)]


def gradient(tuner: DDPO, losses: Tensor) -> Tensor:
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    zeros = (
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )
    return torch.cat([g.flatten() for g in zeros])


def replayed(tuner: DDPO, rollout: Rollout, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of the summed loss, and all ratios' largest deviation from 1."""
    outcomes = [tuner.loss(part, None) for part in pairs_of(rollout, size)]
    deviation = torch.cat([values["first_ratio_deviation_max"] for _, values in outcomes]).max()
    return gradient(tuner, torch.cat([losses for losses, _ in outcomes])), deviation


@each_process
def test_first_ratios_are_one(make: Callable[[], Pipeline]) -> None:
    """Exactly, where replay has the sampler's batch shape, and within 1e-6 in any other."""
    tuner = tuner_of(make())
    rollout = collected(tuner)
    expected = NUM * STEPS - (NUM if isinstance(tuner.pipeline.process, GaussianProcess) else 0)
    assert rollout.num_terms == expected
    assert replayed(tuner, rollout, NUM)[1] == 0
    for size in (None, 7, 1):
        assert replayed(tuner, rollout, size)[1] < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_process
def test_states_kept_in_half_precision_keep_the_first_ratios(
    make: Callable[[], Pipeline], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-4, and not without the rounding before the log-probability."""
    tuner = tuner_of(make(), state_dtype=dtype)
    assert replayed(tuner, collected(tuner))[1] < 1e-4
    if isinstance(tuner.pipeline.process, MaskedProcess):
        return
    monkeypatch.setattr(lit_rlft.core.trajectory, "rounded", lambda x, like, dtype: x)
    assert replayed(tuner, collected(tuner))[1] > 1e-4


@pytest.mark.parametrize("process", [FLOW, MASKED, MIXED], ids=["flow", "masked", "product"])
def test_first_ratios_of_a_half_precision_model(process: Process) -> None:
    tuner = tuner_of(Toy(process).bfloat16())
    rollout = collected(tuner)
    assert replayed(tuner, rollout, NUM)[1] < 1e-4
    pairs = pairs_of(rollout)[0].states
    floating = [leaf for leaf in leaves(pairs["x_t"]) if leaf.is_floating_point()]
    assert all(leaf.dtype == torch.bfloat16 for leaf in floating)
    assert tensor_of(pairs["log_prob"]).dtype == torch.float32


@each_process
def test_states_are_held_once(make: Callable[[], Pipeline]) -> None:
    tuner = tuner_of(make())
    rollout = collected(tuner)
    blank = leaves(tuner.pipeline.blank(rollout.condition))
    one = sum(leaf.numel() * leaf.element_size() for leaf in blank)
    assert rollout.trajectories.num_bytes == (STEPS + 1) * one
    assert rollout.index(torch.tensor([1, 0])).trajectories is rollout.trajectories
    windows = {(1, 2): 2, (0, 2): 3, (2, 4): 3}
    for window, num_states in windows.items():
        kept = collected(tuner_of(make(), window=window)).trajectories
        assert kept.num_bytes == num_states * one


@each_process
def test_trajectories_are_those_of_the_evaluation_sampler(make: Callable[[], Pipeline]) -> None:
    tuner = tuner_of(make())
    rollout = collected(tuner)
    keep, rows = [0, 2, STEPS], torch.arange(NUM)
    with torch.no_grad():
        drawn = tuner.draw_states(rollout.condition, rollout.seeds, keep=keep, relay=tuner.relay())
    for i, state in zip(keep, drawn, strict=True):
        place, end = (i, "x_t") if i < STEPS else (i - 1, "x_s")
        kept = rollout.trajectories.pairs(torch.full((NUM,), place), rows)[end]
        assert all(torch.equal(a, b) for a, b in zip(leaves(kept), leaves(state), strict=True))


def test_half_precision_halves_what_is_held() -> None:
    whole, half = (
        collected(tuner_of(state_dtype=dtype)).trajectories.num_bytes for dtype in (None, "float16")
    )
    assert 2 * half == whole


@each_process
def test_gradients_do_not_depend_on_chunks(make: Callable[[], Pipeline]) -> None:
    """Against one step and one sample at a time, for chunks that cut across steps."""
    pipeline = make().double()
    tuner = tuner_of(pipeline, kl_coef=0.1)
    rollout = collected(tuner)
    with torch.no_grad():
        for parameter in tuner.trainable().parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=_generator()))
    serial, _ = replayed(tuner, rollout, 1)
    assert serial.norm() > 1e-6
    for size in (None, 7, NUM):
        torch.testing.assert_close(replayed(tuner, rollout, size)[0], serial, rtol=1e-8, atol=1e-12)
    halves = [rollout.index(rows) for rows in torch.randperm(NUM, generator=_generator()).split(4)]
    parts = sum(replayed(tuner, half)[0] for half in halves)
    torch.testing.assert_close(parts, serial, rtol=1e-8, atol=1e-12)
    pieces = tuner_of(make().double(), kl_coef=0.1, sampling_batch_size=3)
    again = collected(pieces).trajectories.log_probs
    torch.testing.assert_close(again, rollout.trajectories.log_probs)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def line(**settings: Any) -> DDPO:
    """A mixture on a line, under a schedule whose last step has noise as in Stable Diffusion."""
    pipeline = GaussianMixturePipeline(
        (0.6, 0.4), ((-1.0,), (1.2,)), (0.5, 0.4), residual_width=0
    ).double()
    schedule = DiscreteVP(vp_betas(), steps_offset=1, ends_at_zero=False)
    pipeline.process = pipeline.denoiser.process = GaussianProcess(schedule)
    return tuner_of(pipeline, reward=Hill(), advantage_clip=None, num_candidates=1, **settings)


class Hill(Reward):
    """r(x) = -(x - 0.8)^2."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return -(samples[:, 0] - 0.8).square()


def expected_reward(tuner: DDPO) -> Tensor:
    """E[r(x_0)] by quadrature over x at every step, with a graph; the last step in closed form."""
    process, times = tuner.pipeline.process, tuner.pipeline.process.times(STEPS)
    x = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    spacing = x[1] - x[0]
    density = Normal(0.0, 1.0).log_prob(x).exp()
    condition = tuner.pipeline.encode({"index": torch.arange(len(x))})
    for i in range(STEPS):
        t, s = times[i].expand(len(x)), times[i + 1].expand(len(x))
        prediction = tuner.pipeline(x.unsqueeze(1), t, condition)
        law: Any = process.transition(prediction, x.unsqueeze(1), t, s, 1.0)
        mean, std = law.loc[:, 0], law.std[:, 0]
        if i == STEPS - 1:
            return (density * -((mean - 0.8) ** 2 + std**2)).sum() * spacing
        kernel = Normal(mean.unsqueeze(1), std.unsqueeze(1)).log_prob(x).exp()
        density = (density * spacing) @ kernel
    raise AssertionError


@pytest.mark.parametrize("estimator", ["score_function", "importance_sampling"])
def test_the_gradient_is_that_of_the_expected_reward(estimator: Any) -> None:
    """Within 3 standard errors of 40 rounds, all six parameters; 10 errors and more from 0."""
    tuner = line(estimator=estimator, log_prob_reduction="sum")
    exact = expected_reward(tuner)
    analytic = gradient(tuner, exact)
    tuner.advantage = Raw(float(exact))
    found, rewards = [], []
    for tuner.num_rounds in range(40):
        rollout = collected(tuner, 512)
        assert rollout.num_terms == STEPS * 512
        # The loss is averaged over the steps; the gradient of E[r] sums over them.
        found.append(-STEPS / 512 * replayed(tuner, rollout)[0])
        rewards.append(rollout.metrics["reward"])
    estimates = torch.stack(found)
    error = estimates.std(dim=0) / math.sqrt(len(estimates))
    z = (estimates.mean(dim=0) - analytic) / error
    assert z.abs().max() < 3
    assert (analytic / error).abs().max() > 10
    mean = torch.tensor(rewards, dtype=torch.float64)
    assert abs(mean.mean() - exact) < 3 * mean.std() / math.sqrt(len(mean))


@each_process
def test_importance_sampling_equals_the_score_function_at_first(
    make: Callable[[], Pipeline],
) -> None:
    gradients = []
    for estimator in ("importance_sampling", "score_function"):
        tuner = tuner_of(make(), estimator=estimator)
        gradients.append(replayed(tuner, collected(tuner))[0])
    assert gradients[0].norm() > 1e-6
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def moved(tuner: DDPO, size: float = 0.1) -> DDPO:
    with torch.no_grad():
        for parameter in tuner.trainable().parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=_generator()))
    return tuner


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [PIPELINES["discrete VP"], PIPELINES["flow"]], ids=["VP", "flow"])
def test_the_kl_is_that_of_torch_distributions(make: Any, reduction: Any) -> None:
    tuner = tuner_of(make().double(), kl_coef=0.7, log_prob_reduction=reduction)
    rollout = collected(moved(tuner))
    (part,) = pairs_of(rollout)
    x_t, t, s = (tensor_of(part.states[name]) for name in ("x_t", "t", "s"))
    assert tuner.reference is not None and tuner.reference.frozen is not None
    laws: list[Any] = [
        tuner.pipeline.process.transition(denoiser(x_t, t), x_t, t, s, 1.0)
        for denoiser in (tuner.pipeline.denoiser, tuner.reference.frozen)
    ]
    ours, theirs = (Normal(law.loc, law.std.expand_as(law.loc)) for law in laws)
    kl = getattr(kl_divergence(ours, theirs), reduction)(dim=1)
    assert kl.min() > 0
    losses, values = tuner.loss(part, None)
    share = tensor_of(part.states["share"])
    torch.testing.assert_close(values["reference_kl"], kl * share)
    tuner.kl_coef = 0
    free, without = tuner.loss(part, None)
    assert "reference_kl" not in without
    weight = tensor_of(part.states["weight"])
    torch.testing.assert_close(losses - free, 0.7 * kl * weight)
    torch.testing.assert_close(
        gradient(tuner, losses - free), gradient(tuner, 0.7 * kl * weight), rtol=1e-7, atol=1e-12
    )


def test_the_kl_of_masked_states_is_that_of_torch_distributions() -> None:
    tuner = tuner_of(Toy(MASKED).double(), kl_coef=0.7, log_prob_reduction="sum")
    rollout = collected(moved(tuner))
    (part,) = pairs_of(rollout)
    x_t, t, s = (tensor_of(part.states[name]) for name in ("x_t", "t", "s"))
    assert tuner.reference is not None and tuner.reference.frozen is not None
    logs = [
        torch.cat([((t - s) / t).view(-1, 1, 1).log() + p.log_softmax(-1),
                   (s / t).view(-1, 1, 1).log().expand(*p.shape[:2], 1)], dim=-1)
        for p in (tuner.pipeline.denoiser(x_t, t), tuner.reference.frozen(x_t, t))
    ]  # fmt: skip
    ours, theirs = (Categorical(logits=log.clamp(min=-60)) for log in logs)
    kl = (kl_divergence(ours, theirs) * (x_t == CLASSES)).sum(dim=1)
    _, values = tuner.loss(part, None)
    kl = kl * tensor_of(part.states["share"])
    torch.testing.assert_close(values["reference_kl"].double(), kl, rtol=1e-4, atol=1e-6)
    assert kl.max() > 1e-3 and tuner.loss(part, None)[0].isfinite().all()
    assert gradient(tuner, tuner.loss(part, None)[0]).isfinite().all()


def calls_of(tuner: DDPO) -> dict[str, list[float]]:
    """Record the times of all rows that policy and reference are asked for."""
    assert tuner.reference is not None and tuner.reference.frozen is not None
    calls: dict[str, list[float]] = {"policy": [], "reference": []}
    modules = {"policy": tuner.pipeline.denoiser, "reference": tuner.reference.frozen}
    for who, module in modules.items():

        def record(module: Any, inputs: Any, output: Any, who: str = who) -> None:
            calls[who].extend(inputs[1].tolist())

        module.register_forward_hook(record)
    return calls


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_no_pass_is_wasted(kl_coef: float) -> None:
    """Not the reference at 0, not the step without noise, not samples without an advantage."""
    tuner = tuner_of(kl_coef=kl_coef, advantage=GroupAdvantage(), reward=Pairs())
    calls = calls_of(tuner)
    rollout = collected(tuner)
    assert len(calls["policy"]) == NUM * STEPS
    calls["policy"].clear()
    replayed(tuner, rollout)
    trained = NUM if kl_coef else NUM // 2
    assert len(calls["policy"]) == trained * (STEPS - 1)
    assert len(calls["reference"]) == (trained * (STEPS - 1) if kl_coef else 0)
    last = float(tuner.pipeline.process.times(STEPS)[-2])
    assert last not in calls["policy"]


class Pairs(Reward):
    """Tells the two candidates apart in every second group only."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.5, 0.5] * (len(samples) // 4))


def test_a_step_without_noise_is_sampled_and_not_trained() -> None:
    """It left TRL's weights NaN: its log-probability divides by a std of 0."""
    tuner = tuner_of()
    rollout = collected(tuner)
    assert not rollout.trajectories.log_probs[-1].any() and not rollout.trained[-1].any()
    (part,) = pairs_of(rollout)
    assert set(tensor_of(part.states["t"]).tolist()) == set(
        tuner.pipeline.process.times(STEPS)[: STEPS - 1].tolist()
    )
    assert replayed(tuner, rollout)[0].isfinite().all()
    with pytest.raises(UsageError, match="none of the trained steps has noise"):
        collected(tuner_of(window=(STEPS - 1, STEPS)))


def test_dropping_samples_without_advantage_changes_no_gradient() -> None:
    tuner = tuner_of(GaussianMixturePipeline(residual_width=16).double(), reward=Pairs())
    tuner.advantage = GroupAdvantage()
    rollout = collected(tuner)
    assert rollout.metrics["zero_variance_groups"] == 0.5
    whole = copy.copy(rollout)
    object.__setattr__(whole, "trained", rollout.trajectories.log_probs != 0)
    assert whole.num_terms == 2 * rollout.num_terms
    torch.testing.assert_close(replayed(tuner, whole)[0], replayed(tuner, rollout)[0])


def test_windows_and_subsets() -> None:
    tuner = tuner_of(sampler=Sampler(10, 1.0), window=(2, 9), num_train_steps=3)
    seen = set()
    for tuner.num_rounds in range(6):
        rollout = collected(tuner)
        steps = rollout.trajectories.steps
        assert len(steps) == 3 and steps == sorted(steps) and set(steps) <= set(range(2, 9))
        assert rollout.num_steps == 3 and rollout.num_terms == 3 * NUM
        seen.add(tuple(steps))
        (part,) = pairs_of(rollout)
        times = tuner.pipeline.process.times(10)
        t, s = (tensor_of(part.states[name]) for name in ("t", "s"))
        assert set(t.tolist()) == set(times[steps].tolist())
        assert set(s.tolist()) == {float(times[i + 1]) for i in steps}
    assert len(seen) > 1


def test_a_window_keeps_the_transitions_of_the_whole() -> None:
    whole, part = (collected(tuner_of(window=window)) for window in (None, (1, 3)))
    assert torch.equal(part.trajectories.log_probs, whole.trajectories.log_probs[1:3])
    for place in range(2):
        samples = torch.arange(NUM)
        first = part.trajectories.pairs(torch.full((NUM,), place), samples)
        second = whole.trajectories.pairs(torch.full((NUM,), place + 1), samples)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor_of(first[k]), tensor_of(second[k])) for k in first)


def test_the_next_state_is_the_one_that_was_sampled() -> None:
    rollout = collected(tuner_of())
    samples = torch.arange(NUM)
    chain = [rollout.trajectories.pairs(torch.full((NUM,), i), samples) for i in range(STEPS)]
    for before, after in pairwise(chain):
        assert torch.equal(tensor_of(before["x_s"]), tensor_of(after["x_t"]))
    mean = float(tensor_of(chain[-1]["x_s"])[:, 0].double().mean())
    assert mean == pytest.approx(rollout.metrics["reward"], abs=1e-6)


class Flaky(Reward):
    """Fails for every third sample, or for all."""

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        failed = torch.arange(len(samples)) % 3 == 0
        return samples[:, 0].masked_fill(failed | self.always, math.nan)


def test_failed_rewards_are_masked_and_counted() -> None:
    tuner = tuner_of(reward=Flaky())
    rollout = collected(tuner)
    assert rollout.metrics["failed_rewards"] == 3 / NUM
    assert math.isfinite(rollout.metrics["reward"])
    (part,) = pairs_of(rollout)
    assert len(part) == 5 * (STEPS - 1)
    assert replayed(tuner, rollout)[0].isfinite().all()
    with pytest.raises(UsageError, match="Flaky failed for all 8 samples"):
        collected(tuner_of(reward=Flaky(always=True)))


def test_logged_means_are_over_the_trained_pairs() -> None:
    """Also in uneven chunks: what the updates sum up is divided by the number of samples."""
    tuner = tuner_of(advantage=GroupAdvantage(), reward=Pairs(), clip_range=6e-4)
    rollout = collected(tuner)
    moved(tuner, 1e-4)
    logged: dict[str, float] = {}
    ratios = []
    for part in pairs_of(rollout, 5):
        _, values = tuner.loss(part, None)
        ratios.append(values["ratio"] / tensor_of(part.states["share"]))
        for name, value in values.items():
            logged[name] = logged.get(name, 0.0) + float(value.sum()) / NUM
    assert logged["ratio"] == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-5)
    deviations = (torch.cat(ratios) - 1).abs()
    assert logged["ratio_deviation"] == pytest.approx(float(deviations.mean()), rel=1e-4) != 0
    clipped = float((deviations > tuner.clip_range).float().mean())
    assert 0 < clipped < 1 and logged["clip_fraction"] == pytest.approx(clipped)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no noise": ({"sampler": Sampler(4, 0.0)}, r"sampler\.eta must be above 0.*set it to 1"),
    "group of one": ({"advantage": GroupAdvantage(), "num_candidates": 1}, "group of one"),
    "nobody": ({"num_candidates": 0}, "num_candidates must be at least 1"),
    "clip range 0": ({"clip_range": 0.0}, "clip_range must be above 0"),
    "clip range": ({"clip_range": -0.1}, "clip_range must be above 0"),
    "advantage clip": ({"advantage_clip": 0.0}, "advantage_clip must be above 0"),
    "KL": ({"kl_coef": -1.0}, "kl_coef must be 0 or more"),
    "empty window": ({"window": (2, 2)}, r"window must be \[first, last\]"),
    "long window": ({"window": (0, 5)}, "last <= 4"),
    "no steps": ({"num_train_steps": 0}, "num_train_steps must be from 1"),
    "many steps": ({"num_train_steps": 3, "window": (1, 3)}, "the window's 2 steps"),
    "stale": ({"estimator": "score_function", "num_epochs": 2}, "num_epochs must be 1"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_bad_settings(mistake: str) -> None:
    settings, sentence = WRONG[mistake]
    with pytest.raises(UsageError, match=sentence):
        tuner_of(**settings)


def fitted(folder: Path, advantage: Advantage, num_rounds: int = 20, **settings: Any) -> DDPO:
    pipeline = GaussianMixturePipeline(residual_width=16)
    base: dict[str, Any] = {
        "num_candidates": 4,
        "clip_range": 0.2,
        "log_prob_reduction": "sum",
        "num_epochs": 2,
        "minibatch_size": 128,
        "sampling_batch_size": 256,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    tuner = DDPO(
        pipeline,
        Quadratic(CENTER),
        sampler=Sampler(8, 1.0),
        advantage=advantage,
        **{**base, **settings},
    )
    trainer_of(max_epochs=num_rounds, default_root_dir=folder).fit(
        tuner, MixtureData(num_train=64, batch_size=64)
    )
    return tuner


@torch.no_grad()
def mean_reward(tuner: DDPO, num: int = 2048) -> float:
    condition = tuner.pipeline.encode({"index": torch.arange(num)})
    keep, seeds = [tuner.sampler.num_steps], range(10**6, 10**6 + num)
    (x_0,) = tuner.draw_states(condition, seeds, keep=keep, relay=tuner.relay())
    return float(tuner.reward(x_0, condition).mean())


LEARNERS: dict[str, dict[str, Any]] = {
    "importance sampling": {"advantage": BatchAdvantage()},
    "groups": {"advantage": GroupAdvantage()},
    "score function": {
        "advantage": BatchAdvantage(),
        "estimator": "score_function",
        "num_epochs": 1,
    },
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_learns(learner: str, tmp_path: Path) -> None:
    """From the mixture's -3.1 most of the way to the optimum, 0."""
    assert mean_reward(fitted(tmp_path, **LEARNERS[learner])) > -0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_of_others_teach_nothing(tmp_path: Path, seed: int) -> None:
    assert mean_reward(fitted(tmp_path, Shuffled(), seed=seed)) < -2.2


def test_the_kl_to_the_reference_holds_back(tmp_path: Path) -> None:
    free, held = (
        mean_reward(fitted(tmp_path, BatchAdvantage(), kl_coef=kl_coef)) for kl_coef in (0.0, 5.0)
    )
    assert held < free - 0.5
