r"""Noise PPO against closed forms, on a model that maps noise to data by :math:`x_0 = a x_1 + b`.

One Gaussian is such a model: its denoiser is linear, so every deterministic step is affine. With
:math:`x_1 = \mu + \sigma e` at :math:`\mu = 0, \sigma = 1`,

.. math::
    r = x_0[0]: \quad \partial_\mu E[r] = (a, 0), \quad \partial_{\log\sigma} E[r] = 0, \qquad
    r = -\|x_0 - c\|^2: \quad \partial_\mu E[r] = -2a(b - c), \quad
    \partial_{\log\sigma} E[r] = -2a^2.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.optim.lr_scheduler import LambdaLR

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.base import Experience
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.core.advantage import Advantage, BatchAdvantage, RunningAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Batch, Condition, pooled
from lit_rlft.core.prior import FullResolution, LowRank, LowResolution, Maps, NoisePolicy
from lit_rlft.core.process import MaskedProcess, ProductProcess
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.inference import NoiseGenerator
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

CENTER = (1.5, -1.0)
MAPS: dict[str, Maps] = {
    "full": FullResolution(),
    "low resolution": LowResolution(2),
    "low rank": LowRank(3),
}
each_maps = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
Tiny = Callable[..., Path]


class Raw(Advantage):
    """Rewards themselves, less a constant, so that gradients are those of E[r]."""

    def __init__(self, scale: float = 1.0, baseline: float = 0.0) -> None:
        self.scale, self.baseline = scale, baseline

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return []

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        return self.scale * (rewards.double() - self.baseline)


class Unrelated(Reward):
    """Fresh numbers at every call, whatever the samples."""

    num_calls = 0

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        self.num_calls += 1
        return torch.randn(len(samples), generator=torch.Generator().manual_seed(self.num_calls))


class Sided(GaussianMixturePipeline):
    """One Gaussian under two conditions, which say where the reward is: `side` is 1 or -1."""

    def __init__(self) -> None:
        super().__init__([1.0], [[0.5, -0.25]], [0.6], residual_width=0)

    def encode(self, batch: Batch) -> Condition:
        entries, tables = [{"side": 1.0}, {"side": -1.0}], {"side": torch.tensor([1.0, -1.0])}
        return Condition(entries, tables, batch["index"].cpu() % 2)


class OnItsSide(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return condition.table("side") * samples[:, 0]


class Constant(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.ones(len(samples))


class Patchy(Coordinate):
    """Fails for samples to the left of `edge`."""

    edge = 0.0

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 0].where(samples[:, 0] > self.edge, torch.nan)


def one_gaussian(**settings: Any) -> GaussianMixturePipeline:
    return GaussianMixturePipeline([1.0], [[0.5, -0.25]], [0.6], residual_width=0, **settings)


def tuner_of(reward: Reward | None = None, pipeline: Any = None, **settings: Any) -> NoisePPO:
    base: dict[str, Any] = {"sampler": Sampler(3), "width": 16, "maps": FullResolution()}
    return NoisePPO(pipeline or one_gaussian(), reward or Coordinate(), **{**base, **settings})


def ready(*args: Any, **settings: Any) -> NoisePPO:
    """A tuner that can collect and compute losses outside of a fit."""
    tuner = tuner_of(*args, **settings)
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    return tuner


def fit(tuner: NoisePPO, folder: Path, *, num_conditions: int, num_rounds: int) -> NoisePPO:
    data = MixtureData(num_train=num_conditions, batch_size=num_conditions)
    trainer_of(max_epochs=num_rounds, default_root_dir=folder).fit(tuner, data)
    return tuner


@torch.no_grad()
def collected(tuner: NoisePPO, num_conditions: int = 4) -> Experience:
    batch = {"index": torch.arange(num_conditions)}
    return tuner.collect(batch, tuner.pipeline.encode(batch))


@torch.no_grad()
def disturb(policy: nn.Module, std: float = 0.3) -> None:
    """Leave the start: no weight is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def learned(tuner: NoisePPO) -> tuple[Tensor, Tensor]:
    law = tuner.prior(tuner.pipeline.example())
    return law.loc[0], law.std[0]


@torch.no_grad()
def affine(tuner: NoisePPO) -> tuple[float, Tensor]:
    """a and b of x_0 = a x_1 + b, measured; fails where the sampler is not affine."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    condition = tuner.pipeline.encode({"index": torch.arange(3)})
    pipeline = tuner.pipeline
    x_0 = tensor_of(tuner.sampler.sample(pipeline, pipeline.process, points, condition))
    a, b = float(x_0[1, 0] - x_0[0, 0]), x_0[0]
    torch.testing.assert_close(x_0, a * points + b)
    return a, b


# The law


@each_maps
@pytest.mark.parametrize("shape", [(2,), (5, 3), (4, 3, 6)])
def test_the_start_is_the_unit_normal_to_the_last_bit(maps: Maps, shape: tuple[int, ...]) -> None:
    law = NoisePolicy(7, shape, maps)(torch.randn(3, 7))
    assert law.loc.shape == law.std.shape == (3, *shape)
    assert torch.equal(law.loc, torch.zeros(3, *shape))
    assert torch.equal(law.std, torch.ones(3, *shape))
    rows = [11, 12, 13]
    expected = torch.stack([torch.randn(shape, generator=g) for g in generators(rows)])
    assert torch.equal(tensor_of(law.sample(generators(rows))), expected)


@each_maps
def test_density_divergence_and_entropy_are_those_of_torch(maps: Maps) -> None:
    policy = NoisePolicy(7, (4, 3, 6), maps).double()
    disturb(policy)
    law = policy(torch.randn(3, 7, dtype=torch.float64))
    theirs = Independent(Normal(law.loc, law.std), 3)
    unit = Independent(Normal(torch.zeros_like(law.loc), torch.ones_like(law.std)), 3)
    x = torch.randn_like(law.loc)
    torch.testing.assert_close(law.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(law.log_prob(x, "mean"), theirs.log_prob(x) / x[0].numel())
    start = Gaussian(torch.zeros_like(law.loc), torch.ones_like(law.std))
    torch.testing.assert_close(law.kl(start), kl_divergence(theirs, unit))
    formula = 0.5 * (law.loc**2 + law.std**2 - 1 - law.std.log() * 2).flatten(1).sum(dim=1)
    torch.testing.assert_close(law.kl(start), formula)


def test_maps_have_as_much_freedom_as_they_say() -> None:
    torch.manual_seed(0)

    def laws(maps: Maps, num: int = 40) -> Tensor:
        policy = NoisePolicy(5, (2, 6, 6), maps, width=32)
        disturb(policy.head)
        return policy(torch.randn(num, 5)).loc.detach()

    assert torch.linalg.matrix_rank(laws(FullResolution()).flatten(1), rtol=1e-4) > 8
    low_rank = laws(LowRank(3))
    assert torch.linalg.matrix_rank(low_rank.flatten(1), rtol=1e-4) == 3
    constant = laws(LowResolution(1))
    torch.testing.assert_close(constant, constant[..., :1, :1].expand_as(constant))
    ranks = torch.linalg.matrix_rank(laws(LowResolution(2)), rtol=1e-4)
    assert torch.equal(ranks, torch.full_like(ranks, 2))
    # Maps no larger than the state are the state's own.
    assert NoisePolicy(5, (2, 6, 6), LowResolution(9)).head[0][0].out_features == 2 * 72


def test_conditions_have_laws_of_their_own_unless_told_otherwise() -> None:
    for conditional in (True, False):
        policy = NoisePolicy(5, (2,), FullResolution(), conditional=conditional)
        disturb(policy)
        first, second = policy(torch.randn(2, 5)).loc
        assert torch.equal(first, second) is not conditional
        policy(torch.randn(2, 5)).loc.sum().backward()
        assert all(parameter.grad is not None for parameter in policy.parameters())


def test_features_are_averages_of_the_encoding() -> None:
    encoding = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(pooled(encoding), encoding.mean(dim=1).float())
    assert pooled(torch.arange(3)).tolist() == [[0.0], [1.0], [2.0]]
    assert torch.equal(pooled(encoding[:, 0]), encoding[:, 0].float())
    pipeline = one_gaussian()
    condition = pipeline.encode({"index": torch.arange(3)})
    assert torch.equal(pipeline.features(condition), torch.ones(3, 1))
    tables = {"b": encoding, "a": torch.arange(3)}
    condition = Condition([{}] * 3, tables, torch.tensor([2, 0, 0, 1]))
    features = pipeline.features(condition)
    assert features.shape == (4, 6) and features[:, 0].tolist() == [2, 0, 0, 1]


# The estimator


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("reward", [Coordinate(), Quadratic(CENTER)], ids=["linear", "quadratic"])
def test_the_gradient_is_that_of_the_expected_reward(reward: Reward, reduction: Any) -> None:
    """Within 3 standard errors, over 64 independent parts of 512 samples."""
    num_parts, size = 64, 512
    tuner = ready(
        reward,
        num_candidates=size,
        advantage=Raw(),
        advantage_clip=None,
        beta=0.0,
        sampling_batch_size=8192,
        log_prob_reduction=reduction,
    )
    a, b = affine(tuner)
    experience = collected(tuner, num_parts)
    losses, _ = tuner.loss(experience, None)
    # The output layer's bias is (mu, log sigma) where its weights are zero.
    bias = tuner.trainable().head[0].bias
    means = losses.view(num_parts, size).mean(dim=1)
    parts = [torch.autograd.grad(part, bias, retain_graph=True)[0] for part in means]
    gradient = -torch.stack(parts).double() * (2 if reduction == "mean" else 1)
    if isinstance(reward, Quadratic):
        expected = torch.cat([-2 * a * (b - torch.tensor(CENTER)), torch.full((2,), -2 * a**2)])
    else:
        expected = torch.tensor([a, 0.0, 0.0, 0.0])
    error = gradient.std(dim=0) / math.sqrt(num_parts)
    deviations = (gradient.mean(dim=0) - expected) / error
    assert deviations.abs().max() < 3, deviations
    assert error.max() < 0.1


def test_the_gradient_of_a_moved_policy_is_that_of_the_expected_reward_and_the_kl() -> None:
    """d/dmu E[-|a x_1 + b - c|^2] = -2a(a mu + b - c); d/dlog sigma = -2 a^2 sigma^2; KL: mu and
    sigma^2 - 1. The moved policy is reached by the bias alone."""
    num_parts, size, beta = 64, 512, 0.7
    tuner = ready(
        Quadratic(CENTER),
        num_candidates=size,
        advantage=Raw(),
        advantage_clip=None,
        beta=beta,
        sampling_batch_size=8192,
    )
    a, b = affine(tuner)
    mu, log_sigma = torch.tensor([0.4, -0.8]), torch.tensor([0.2, -0.3])
    bias = tuner.trainable().head[0].bias
    with torch.no_grad():
        bias.copy_(torch.cat([mu, log_sigma]))
    losses, _ = tuner.loss(collected(tuner, num_parts), None)
    means = losses.view(num_parts, size).mean(dim=1)
    parts = [torch.autograd.grad(part, bias, retain_graph=True)[0] for part in means]
    gradient = -torch.stack(parts).double()
    variance = (2 * log_sigma).exp()
    of_reward = torch.cat([-2 * a * (a * mu + b - torch.tensor(CENTER)), -2 * a**2 * variance])
    expected = of_reward - beta * torch.cat([mu, variance - 1])
    error = gradient.std(dim=0) / math.sqrt(num_parts)
    assert ((gradient.mean(dim=0) - expected) / error).abs().max() < 3


def test_the_reduction_does_not_move_the_optimum() -> None:
    """At ratio 1 the losses' gradients differ by the factor d, surrogate and KL alike."""
    gradients = []
    for reduction in ("sum", "mean"):
        tuner = ready(log_prob_reduction=reduction, beta=0.5)
        disturb(tuner.trainable())
        losses, _ = tuner.loss(collected(tuner), None)
        gradients.append(torch.autograd.grad(losses.sum(), list(tuner.trainable().parameters())))
    for total, mean in zip(*gradients, strict=True):
        torch.testing.assert_close(total, 2 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_first_ratio_is_one(tiny_stable_diffusion: Tiny, reduction: Any, moved: bool) -> None:
    """Exactly at equal batch shape, below 1e-6 at any other."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=1.0)
    settings = {"sampler": Sampler(1), "num_candidates": 4, "log_prob_reduction": reduction}
    tuner = ready(Symmetry(), pipeline, maps=LowResolution(2), width=64, **settings)
    if moved:
        disturb(tuner.trainable(), 0.03)
    batch = {"index": torch.arange(3), "prompt": ["a red ring", "a star", "two blue stars"]}
    with torch.no_grad():
        experience = tuner.collect(batch, pipeline.encode(batch))
    values = tuner.loss(experience, None)[1]
    assert float(values["ratio_deviation"].max()) == 0
    assert float(values["first_ratio_deviation_max"].max()) == 0
    assert torch.equal(values["clip_fraction"], torch.zeros(12, dtype=torch.float64))
    for row in range(12):
        part = experience.terms(torch.tensor([row]))
        assert float(tuner.loss(part, None)[1]["ratio_deviation"]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half = tuner.loss(experience, None)[1]
    assert float(half["ratio_deviation"].max()) < 1e-4


def test_experience_is_the_initial_noise_and_two_numbers() -> None:
    tuner = ready(num_candidates=5)
    disturb(tuner.trainable())
    experience = collected(tuner, 3)
    assert {name: tuple(tensor_of(s).shape) for name, s in experience.states.items()} == {
        "x_1": (15, 2),
        "log_prob": (15,),
        "advantage": (15,),
    }
    law = tuner.prior(experience.condition)
    x_1 = tensor_of(law.sample(generators(experience.seeds)))
    assert torch.equal(x_1, tensor_of(experience.states["x_1"]))
    power = float(x_1.double().square().mean())
    assert experience.metrics["noise_power"] == pytest.approx(power)
    entropy = Normal(law.loc, law.std).entropy().mean(dim=1)
    values = tuner.loss(experience, None)[1]
    torch.testing.assert_close(values["entropy"].float(), entropy)
    torch.testing.assert_close(
        values["kl"], law.kl(Gaussian(law.loc * 0, law.std * 0 + 1)).double()
    )


# Learning


def annealed(num_rounds: int) -> dict[str, Any]:
    """Return settings of two large updates a round, whose rate falls to zero."""
    return {
        "minibatch_size": 512,
        "sampling_batch_size": 1024,
        "num_epochs": 2,
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.003),
        "lr_scheduler": lambda o: LambdaLR(o, lambda i: max(0.0, 1 - i / (2 * num_rounds))),
    }


def test_the_optimum_under_the_kl_is_found(tmp_path: Path) -> None:
    """E[a x_1] - beta KL is largest at mu = a / beta, sigma = 1."""
    beta = 0.8
    num_rounds = 150
    tuner = tuner_of(
        num_candidates=64,
        advantage=Raw(),
        advantage_clip=None,
        beta=beta,
        **annealed(num_rounds),
    )
    fit(tuner, tmp_path, num_conditions=8, num_rounds=num_rounds)
    a, _ = affine(tuner)
    mu, sigma = learned(tuner)
    np.testing.assert_allclose(mu, [a / beta, 0], atol=0.06)
    np.testing.assert_allclose(sigma, [1, 1], atol=0.05)


def test_group_advantages_find_the_optimum_of_the_standardised_reward(tmp_path: Path) -> None:
    """A = (r - mean) / std of groups of M normals: mu = E[std_M] / beta, for any slope a."""
    num_rounds, num_candidates, beta = 120, 16, 1.5
    tuner = tuner_of(
        num_candidates=num_candidates,
        beta=beta,
        **annealed(num_rounds),
    )
    fit(tuner, tmp_path, num_conditions=32, num_rounds=num_rounds)
    m = num_candidates
    std = math.sqrt(2 / m) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2))
    mu, sigma = learned(tuner)
    np.testing.assert_allclose(mu, [std / beta, 0], atol=0.06)
    np.testing.assert_allclose(sigma, [1, 1], atol=0.05)


def test_rewards_that_do_not_depend_on_the_noise_teach_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_candidates": 16,
        "beta": 0.1,
        "minibatch_size": 512,
        "sampling_batch_size": 1024,
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.003),
    }
    runs = {}
    for reward in (Coordinate(), Unrelated(), Constant()):
        tuner = tuner_of(reward, **settings)
        fit(tuner, tmp_path, num_conditions=32, num_rounds=50)
        runs[reward.name] = learned(tuner)
    assert runs["Coordinate"][0][0] > 1
    mu, sigma = runs["Unrelated"]
    assert mu.abs().max() < 0.15 and (sigma - 1).abs().max() < 0.15
    mu, sigma = runs["Constant"]
    assert torch.equal(mu, torch.zeros(2)) and torch.equal(sigma, torch.ones(2))


@pytest.mark.parametrize("condition_free", [False, True])
def test_each_condition_gets_a_prior_of_its_own(tmp_path: Path, condition_free: bool) -> None:
    """Alone, two opposite rewards pull mu apart; together, they leave it where it is."""
    tuner = tuner_of(
        OnItsSide(),
        Sided(),
        num_candidates=16,
        beta=1.0,
        minibatch_size=512,
        sampling_batch_size=1024,
        condition_free=condition_free,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.005),
    )
    fit(tuner, tmp_path, num_conditions=32, num_rounds=50)
    with torch.no_grad():
        law = tuner.prior(tuner.pipeline.encode({"index": torch.arange(2)}))
    std = 0.95  # of 16 normals, on average
    expected = torch.tensor([0.0, 0.0] if condition_free else [std, -std])
    assert (law.loc[:, 0] - expected).abs().max() < 0.2
    assert law.loc[:, 1].abs().max() < 0.2
    assert torch.equal(law.loc[0], law.loc[1]) is condition_free


def test_failed_rewards_are_left_out_and_counted() -> None:
    reward = Patchy()
    tuner = ready(reward, num_candidates=64, advantage=BatchAdvantage())
    experience = collected(tuner)
    failed = experience.metrics["failed_rewards"]
    assert 0.1 < failed < 0.5
    advantages = tensor_of(experience.states["advantage"])
    assert float((advantages == 0).double().mean()) == failed
    assert advantages.isfinite().all() and math.isfinite(experience.metrics["reward"])
    assert tuner.loss(experience, None)[0].isfinite().all()
    reward.edge = math.inf
    with pytest.raises(UsageError, match="Patchy failed for all 256 samples of the round"):
        collected(tuner)


# What is left alone


def pictures(tiny: Path, folder: Path) -> tuple[TextToImagePipeline, PromptData]:
    pipeline = TextToImagePipeline(str(tiny), guidance_scale=2.0)
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a ring\na star\na red cross\na blue ring\na circle\ntwo")
    splits = {"num_test_prompts": 1, "num_val_prompts": 1}
    return pipeline, PromptData(str(folder / "prompts.txt"), batch_size=2, **splits)


def painted(tiny: Path, folder: Path, **settings: Any) -> NoisePPO:
    """A fit of two rounds on a tiny diffusion model."""
    pipeline, data = pictures(tiny, folder)
    settings = {"num_candidates": 4, "maps": LowResolution(2), **settings}
    optimizer = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}
    tuner = tuner_of(Symmetry(), pipeline, **optimizer, **settings)
    trainer_of(max_epochs=1, default_root_dir=folder).fit(tuner, data)
    assert tuner.num_updates
    return tuner


def test_nothing_but_the_policy_changes(tiny_stable_diffusion: Tiny, tmp_path: Path) -> None:
    before = TextToImagePipeline(str(tiny_stable_diffusion())).state_dict()
    tuner = painted(tiny_stable_diffusion(), tmp_path)
    after = tuner.pipeline.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.numpy().tobytes() == after[name].numpy().tobytes(), name
    assert not any(parameter.requires_grad for parameter in tuner.pipeline.parameters())
    # The frozen denoiser is its own reference: no second copy is held.
    assert tuner.reference is not None and tuner.reference.frozen is None
    tuner.trainer.save_checkpoint(tmp_path / "file.ckpt")
    held = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]
    own = {f"noise_policy.{name}" for name, _ in tuner.trainable().named_parameters()}
    assert set(held) == own


def test_full_fine_tuning_still_has_a_frozen_reference() -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate())
    tuner.setup("fit")
    assert tuner.reference is not None and tuner.reference.frozen is not None


def test_tuned_and_reference_start_from_the_same_noise() -> None:
    tuner = ready(num_eval_samples=3)
    batch = {"index": torch.arange(2)}
    condition = tuner.pipeline.encode(batch).repeat(3)

    def drawn() -> list[Tensor]:
        with torch.no_grad():
            return [
                tensor_of(tuner._draw(batch, condition, arm)[0]) for arm in ("tuned", "reference")
            ]

    tuned, reference = drawn()
    assert torch.equal(tuned, reference)
    bias = tuner.trainable().head[0].bias
    with torch.no_grad():
        bias.copy_(torch.tensor([0.5, -0.25, math.log(2), 0.0]))
    moved, unmoved = drawn()
    assert torch.equal(unmoved, reference)
    a, b = affine(tuner)
    e = (reference - b) / a
    x_1 = torch.tensor([0.5, -0.25]) + torch.tensor([2.0, 1.0]) * e
    torch.testing.assert_close(moved, a * x_1 + b)


def test_the_reported_kl_is_that_of_the_priors() -> None:
    tuner = ready(num_eval_samples=2)
    with torch.no_grad():
        tuner.trainable().head[0].bias.copy_(torch.tensor([1.0, 0.0, math.log(2), 0.0]))
    tuner.on_test_epoch_start()
    with torch.no_grad():
        tuner.validation_step({"index": torch.arange(3)}, 0)
    values = tuner.evaluation.summary(1)["tuned"]["kl"]
    expected = 0.5 + 0.5 * (4 - 1 - math.log(4))
    assert values["mean"] == pytest.approx(expected) and values["sem"] == pytest.approx(0, abs=1e-7)
    # Sampling alone was paid for.
    assert tuner._meter.denoiser_calls == 2 * 6 * tuner.sampler.num_steps


# The file


@each_maps
@pytest.mark.parametrize("conditional", [True, False])
def test_a_noise_generator_comes_back_from_its_file(
    tmp_path: Path, maps: Maps, conditional: bool
) -> None:
    policy = NoisePolicy(6, (3, 4, 5), maps, width=8, conditional=conditional)
    disturb(policy)
    path = NoiseGenerator(policy, {"pipeline": "tiny", "num_steps": 3}).save(
        tmp_path / "a/b.safetensors"
    )
    loaded = NoiseGenerator.load(path)
    assert loaded.notes == {"pipeline": "tiny", "num_steps": 3}
    encoding, seeds = torch.randn(2, 7, 6), [1, 2]
    law = policy(encoding.mean(dim=1))
    expected = law.sample(generators(seeds))
    torch.testing.assert_close(loaded(encoding, generators(seeds)), tensor_of(expected))
    assert torch.equal(
        loaded(encoding, torch.Generator().manual_seed(0)),
        loaded(encoding, torch.Generator().manual_seed(0)),
    )
    assert loaded(encoding.half()).dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_and_encodings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        NoiseGenerator.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(UsageError, match="is no noise generator written by lit-rlft"):
            NoiseGenerator.load(tmp_path / f"{name}.safetensors")
    own = NoiseGenerator(NoisePolicy(6, (2,), type("Own", (FullResolution,), {})()))
    with pytest.raises(UsageError, match="maps of a kind of your own, Own"):
        NoiseGenerator.load(own.save(tmp_path / "own.safetensors"))
    generator = NoiseGenerator(NoisePolicy(6, (2,), FullResolution()), {"pipeline": "tiny"})
    with pytest.raises(UsageError, match=r"has 5 features.*trained with 6.*with tiny"):
        generator(torch.zeros(1, 3, 5))
    with pytest.raises(UsageError, match="2 generators were given for 3 conditions"):
        generator(torch.zeros(3, 6), generators([1, 2]))


@pytest.mark.parametrize("kind", [{}, {"prediction_type": "v_prediction", "size": (16, 32)}])
def test_plain_diffusers_paints_our_pictures(
    tiny_stable_diffusion: Tiny, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """`pipe(prompt, latents=generator(embeds, generator=...))`, same seeds, eta 0, same steps."""
    folder = tiny_stable_diffusion(**kind)
    tuner = painted(folder, tmp_path)
    disturb(tuner.trainable(), 0.05)
    (path,) = tuner.export(tmp_path / "tuned")
    prompts, seeds, steps = ["a red ring", "two stars"], [3, 4], tuner.sampler.num_steps
    condition = tuner.pipeline.encode({"prompt": prompts})
    relay, seeds_of = tuner.relay(), [seed_from(seed) for seed in seeds]
    with torch.no_grad():
        (x_0,) = tuner.draw_states(condition, seeds_of, keep=[steps], relay=relay)
        ours = tuner.pipeline.decode(x_0, condition)

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = NoiseGenerator.load(path)
    assert generator.notes == {"pipeline": "tiny", "num_steps": steps}
    embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    common = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    latents = generator(embeds, generator=generators(seeds_of))
    theirs = pipe(prompts, latents=latents, **common).images
    assert (ours - theirs).abs().max() < 1e-3
    plain = pipe(prompts, generator=generators(seeds_of), **common).images
    assert (plain - theirs).abs().max() > 1e-3
    # Before training, latents are those that diffusers draws, one generator or several.
    start = NoisePolicy(embeds.shape[-1], latents.shape[1:], LowResolution(2))
    for generator_of in (lambda: generators(seeds_of), lambda: torch.Generator().manual_seed(5)):
        latents = NoiseGenerator(start)(embeds, generator=generator_of())
        theirs = pipe(prompts, latents=latents, **common).images
        assert torch.equal(theirs, pipe(prompts, generator=generator_of(), **common).images)


def test_the_loader_needs_neither_lightning_nor_diffusers() -> None:
    code = (
        "import sys, lit_rlft.inference\n"
        "print(sorted({'lightning', 'peft', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# Refusals


class Masked(GaussianMixturePipeline):
    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "stochastic sampler": ({"sampler": Sampler(3, 1.0)}, "sampler.eta must be 0.*ddpo.yaml"),
    "adapter": ({"lora": LoRA()}, "lora must be null: NoisePPO leaves the denoiser as it is"),
    "group of one": ({"num_candidates": 1}, "a group of one has no peers"),
    "no candidates": ({"num_candidates": 0, "advantage": BatchAdvantage()}, "num_candidates must"),
    "clip range": ({"clip_range": 0.0}, "clip_range must be above 0"),
    "advantage clip": ({"advantage_clip": 0.0}, "advantage_clip must be above 0"),
    "beta": ({"beta": -1.0}, "beta must be 0 or more"),
    "width": ({"width": 0}, "width must be at least 1"),
    "masked process": (
        {"pipeline": Masked(MaskedProcess(3))},
        "learns a Gaussian prior, but Masked.*MaskedProcess; use configs/algorithms/ddpo.yaml",
    ),
    "product process": (
        {"pipeline": Masked(ProductProcess({"a": MaskedProcess(3)}))},
        "ProductProcess; use configs/algorithms/ddpo.yaml",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_work_is_refused_at_start_up(mistake: str) -> None:
    settings, sentence = MISTAKES[mistake]
    with pytest.raises(UsageError, match=sentence):
        tuner_of(**settings).setup("fit")


def test_maps_without_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"maps\.init_args.size must be at least 1"):
        LowResolution(0)
    with pytest.raises(UsageError, match=r"maps\.init_args.rank must be at least 1"):
        LowRank(0)


def test_states_of_several_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = ready()
    monkeypatch.setattr(tuner.pipeline, "blank", lambda condition: torch.empty(len(condition), 3))
    with pytest.raises(UsageError, match=r"needs states of one size.*\(2,\) and \(3,\)"):
        tuner.prior(tuner.pipeline.example())


def test_running_statistics_travel_with_checkpoints() -> None:
    first = ready(advantage=RunningAdvantage(8, 2), num_candidates=4)
    collected(first)
    checkpoint: dict[str, Any] = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    second = ready(advantage=RunningAdvantage(8, 2), num_candidates=4)
    second.on_load_checkpoint(checkpoint)
    assert second.advantage.state_dict() == first.advantage.state_dict() != {}
    json.dumps(checkpoint["lit_rlft"]["advantage"])
