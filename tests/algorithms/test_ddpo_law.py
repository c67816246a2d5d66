r"""DDPO's gradients and divergences against quadrature and torch.distributions; what it learns.

The gradient of E[r] has no free parameters on a mixture in one dimension: the law of x is carried
from step to step by the transitions on a grid, :math:`p_s(y) = \int p_t(x)\, N(y; \mu_\theta(x),
std^2)\, dx`, and differentiated.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Quadratic
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.core.advantage import Advantage, BatchAdvantage, GroupAdvantage
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.updates import Passes, Update, accumulate
from tests.algorithms.ddpo_support import (
    CLASSES,
    MASKED,
    NUM,
    PIPELINES,
    STEPS,
    Pairs,
    Toy,
    collected,
    each_process,
    ends_of,
    gradient,
    pairs_of,
    replayed,
    seeded_generator,
    tuner_of,
)
from tests.support import trainer_of

CENTER = (0.75, -0.5)


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
        coefficients = process.noisy_coefficients(t, s, tuner.sampler.noise)
        law: Any = process.step(prediction, x.unsqueeze(1), coefficients)
        mean, std = law.loc[:, 0], law.std[:, 0]
        if i == STEPS - 1:
            return (density * -((mean - 0.8) ** 2 + std**2)).sum() * spacing
        kernel = Normal(mean.unsqueeze(1), std.unsqueeze(1)).log_prob(x).exp()
        density = (density * spacing) @ kernel
    raise AssertionError


SDE = Sampler(STEPS, 0.7, "flow_sde")


@pytest.mark.parametrize(
    ("estimator", "sampler"),
    [
        ("score_function", Sampler(STEPS, 1.0)),
        ("importance_sampling", Sampler(STEPS, 1.0)),
        pytest.param("importance_sampling", SDE, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_the_expected_reward(estimator: Any, sampler: Sampler) -> None:
    """Within 3 standard errors of 40 rounds, all six parameters; 10 errors and more from 0."""
    tuner = line(estimator=estimator, log_prob_reduction="sum", sampler=sampler)
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
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def moved(tuner: DDPO, size: float = 0.1) -> DDPO:
    with torch.no_grad():
        for parameter in tuner.trainable().parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=seeded_generator()))
    return tuner


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [PIPELINES["discrete VP"], PIPELINES["flow"]], ids=["VP", "flow"])
def test_the_kl_is_that_of_torch_distributions(make: Any, reduction: Any) -> None:
    tuner = tuner_of(make().double(), kl_coef=0.7, log_prob_reduction=reduction)
    rollout = collected(moved(tuner))
    (part,) = pairs_of(rollout)
    x_t, t = (tensor_of(part.states[name]) for name in ("x_t", "t"))
    s = ends_of(tuner, t)
    assert tuner.reference is not None and tuner.reference.frozen is not None
    laws: list[Any] = [
        tuner.pipeline.process.transition(denoiser(x_t, t), x_t, t, s, 1.0)
        for denoiser in (tuner.pipeline.denoiser, tuner.reference.frozen)
    ]
    ours, theirs = (Normal(law.loc, law.std.expand_as(law.loc)) for law in laws)
    kl = getattr(kl_divergence(ours, theirs), reduction)(dim=1)
    assert kl.min() > 0
    losses, values = tuner.loss(part, None)
    torch.testing.assert_close(values["reference_kl"], kl)
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
    x_t, t = (tensor_of(part.states[name]) for name in ("x_t", "t"))
    s = ends_of(tuner, t)
    assert tuner.reference is not None and tuner.reference.frozen is not None
    logs = [
        torch.cat([((t - s) / t).view(-1, 1, 1).log() + p.log_softmax(-1),
                   (s / t).view(-1, 1, 1).log().expand(*p.shape[:2], 1)], dim=-1)
        for p in (tuner.pipeline.denoiser(x_t, t), tuner.reference.frozen(x_t, t))
    ]  # fmt: skip
    ours, theirs = (Categorical(logits=log.clamp(min=-60)) for log in logs)
    kl = (kl_divergence(ours, theirs) * (x_t == CLASSES)).sum(dim=1)
    _, values = tuner.loss(part, None)
    torch.testing.assert_close(values["reference_kl"].double(), kl, rtol=1e-4, atol=1e-6)
    assert kl.max() > 1e-3 and tuner.loss(part, None)[0].isfinite().all()
    assert gradient(tuner, tuner.loss(part, None)[0]).isfinite().all()


def test_dropping_samples_without_advantage_changes_no_gradient() -> None:
    tuner = tuner_of(GaussianMixturePipeline(residual_width=16).double(), reward=Pairs())
    tuner.advantage = GroupAdvantage()
    rollout = collected(tuner)
    assert rollout.metrics["zero_variance_groups"] == 0.5
    whole = copy.copy(rollout)
    object.__setattr__(whole, "trained", rollout.trajectories.log_probs != 0)
    assert whole.num_terms == 2 * rollout.num_terms
    torch.testing.assert_close(replayed(tuner, whole)[0], replayed(tuner, rollout)[0])


def test_advantages_are_clamped() -> None:
    free, clamped = (collected(tuner_of(advantage_clip=clip)).advantages for clip in (None, 0.2))
    assert free.abs().max() > 0.2 and torch.equal(clamped, free.clamp(-0.2, 0.2))


@pytest.mark.parametrize("shares", [[NUM], [5, 3], [1, 0, 7]], ids=str)
def test_logged_means_are_over_the_trained_pairs(shares: list[int]) -> None:
    """Of all processes, which have unequally many, also in uneven microbatches."""
    tuner = tuner_of(advantage=GroupAdvantage(), reward=Pairs(), clip_range=6e-4)
    rollout = collected(tuner)
    moved(tuner, 1e-4)
    ratios = [tuner.loss(part, None)[1]["ratio"] for part in pairs_of(rollout, 5)]
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    logged: dict[str, float] = {}
    for rows in torch.arange(NUM).split(shares):
        update = Update(rollout.index(rows), 0, NUM, rollout.num_terms)
        passes = Passes(torch.Tensor.backward, parameters, 5, len(shares))
        own = accumulate(update, tuner.loss, passes)
        for name, value in own.items():
            logged[name] = logged.get(name, 0.0) + value / len(shares)
    assert logged["ratio"] == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-5)
    deviations = (torch.cat(ratios) - 1).abs()
    assert logged["ratio_deviation"] == pytest.approx(float(deviations.mean()), rel=1e-4) != 0
    clipped = float((deviations > tuner.clip_range).float().mean())
    assert 0 < clipped < 1 and logged["clip_fraction"] == pytest.approx(clipped)


def fitted(folder: Path, advantage: Advantage, num_rounds: int = 20, **settings: Any) -> DDPO:
    pipeline = GaussianMixturePipeline(residual_width=16)
    base: dict[str, Any] = {
        "sampler": Sampler(8, 1.0),
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
    (x_0,) = tuner.rollouts.draw(tuner.route(), condition, seeds, keep=keep)
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
