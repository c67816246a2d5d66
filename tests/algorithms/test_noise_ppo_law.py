r"""Noise PPO against closed forms, on a model that maps noise to data by :math:`x_0 = a x_1 + b`.

One Gaussian is such a model: its denoiser is linear, so every deterministic step is affine. With
:math:`x_1 = \mu + \sigma e` at :math:`\mu = 0, \sigma = 1`,

.. math::
    r = x_0[0]: \quad \partial_\mu E[r] = (a, 0), \quad \partial_{\log\sigma} E[r] = 0, \qquad
    r = -\|x_0 - c\|^2: \quad \partial_\mu E[r] = -2a(b - c), \quad
    \partial_{\log\sigma} E[r] = -2a^2.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import scaled_dot_product_attention

from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Condition, pooled, tokens_of
from lit_rlft.core.prior import FullResolution, LowRank, LowResolution, Maps, NoisePolicy
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.state import tensor_of
from tests.algorithms.noise_ppo_support import (
    Raw,
    affine,
    collected,
    disturb,
    each_maps,
    one_gaussian,
    ready,
)

CENTER = (1.5, -1.0)


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
def test_attention_starts_at_the_unit_normal_too(maps: Maps) -> None:
    law = NoisePolicy(7, (4, 3, 6), maps, heads=3)(torch.randn(3, 5, 7))
    assert torch.equal(law.loc, torch.zeros(3, 4, 3, 6))
    assert torch.equal(law.std, torch.ones(3, 4, 3, 6))


def test_attention_is_that_of_torch_and_all_of_it_is_trained() -> None:
    policy = NoisePolicy(7, (2,), FullResolution(), heads=3, width=16).double()
    disturb(policy)
    tokens = torch.randn(4, 5, 7, dtype=torch.float64)
    bounded = tokens / (1 + tokens.square().mean(dim=2, keepdim=True).sqrt())
    queries = policy.attention.scores.weight.expand(4, -1, -1)
    read = scaled_dot_product_attention(queries, bounded, bounded, scale=1.0).flatten(1)
    mu, log_sigma = policy.head(policy.trunk(read)).unbind(dim=1)
    law = policy(tokens)
    torch.testing.assert_close(law.loc, mu)
    torch.testing.assert_close(law.std, log_sigma.exp())
    law.loc.sum().backward()
    assert all(bool(p.grad.any()) for p in policy.parameters())


def test_attention_tells_apart_what_the_average_does_not() -> None:
    """The same numbers at other places: tokens differ, their average does not."""
    first = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]])
    second = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 1.0, 2.0]]])
    for heads in (0, 2):
        policy = NoisePolicy(3, (2,), FullResolution(), heads=heads)
        disturb(policy)
        same = torch.allclose(policy(first).loc, policy(second).loc, atol=1e-5)
        assert same is (heads == 0)


def test_the_average_of_joined_tokens_is_that_of_their_parts() -> None:
    parts = [torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 2), torch.randn(3, 4, 1)]
    tokens = tokens_of(parts)
    assert tokens.shape == (3, 4, 8) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.mean(dim=1), torch.cat([*map(pooled, parts)], dim=1))
    assert torch.equal(tokens[:, 2, 5:7], parts[1])
    assert torch.equal(tokens_of([parts[1]]), parts[1].unsqueeze(1))


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
        assert torch.allclose(first, second, atol=1e-5) is not conditional
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


def test_the_prior_is_in_units_of_the_processs_own() -> None:
    """Schedulers of diffusers may start from noise of another size."""
    tuner = ready()
    disturb(tuner.trainable())
    tuner.pipeline.process.schedule.start_scale = 0.25
    condition = tuner.pipeline.encode({"index": torch.arange(3)})
    z, law = tuner.trainable()(tuner.pipeline.features(condition)), tuner.prior(condition)
    torch.testing.assert_close(law.loc, 0.25 * z.loc)
    torch.testing.assert_close(law.std, 0.25 * z.std)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_experience_is_the_initial_noise_and_two_numbers(reduction: Any) -> None:
    tuner = ready(num_candidates=5, log_prob_reduction=reduction)
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


def test_advantages_are_clamped() -> None:
    free, clamped = (
        tensor_of(collected(ready(advantage_clip=clip)).states["advantage"]) for clip in (None, 0.2)
    )
    assert free.abs().max() > 0.2 and torch.equal(clamped, free.clamp(-0.2, 0.2))


def test_the_reported_kl_is_that_of_the_priors() -> None:
    tuner = ready(num_eval_samples=2)
    with torch.no_grad():
        tuner.trainable().head[0].bias.copy_(torch.tensor([1.0, 0.0, math.log(2), 0.0]))
    tuner.on_test_epoch_start()
    with torch.no_grad():
        tuner.validation_step({"index": torch.arange(3)}, 0)
    values = tuner.evaluator.summary()["tuned"]["kl"]
    expected = 0.5 + 0.5 * (4 - 1 - math.log(4))
    assert values["mean"] == pytest.approx(expected) and values["sem"] == pytest.approx(0, abs=1e-6)
    # Sampling alone was paid for.
    assert tuner.meter.current.denoiser_calls == 2 * 6 * tuner.sampler.num_steps
