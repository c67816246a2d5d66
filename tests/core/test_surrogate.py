"""Golden numbers: DDPO's log-probability and loss written out with plain floats."""

import math

import pytest
import torch

from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.surrogate import importance_sampling, ratio_values, score_function

CLIP = 1e-4


def test_the_mean_log_prob_is_ddpos() -> None:
    """Mean over dimensions of -(x - mu)^2 / (2 std^2) - log std - log sqrt(2 pi)."""
    x, mu, std = (
        [[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]],
        [[0.4, -0.5, 1.0], [0.0, 0.0, 0.5]],
        [0.3, 2.0],
    )
    expected = [
        sum(
            -((a - b) ** 2) / (2 * s**2) - math.log(s) - math.log(math.sqrt(2 * math.pi))
            for a, b in zip(xs, mus, strict=True)
        )
        / 3
        for xs, mus, s in zip(x, mu, std, strict=True)
    ]
    assert expected == pytest.approx([-2.0482991, -1.6158357], abs=1e-6)
    law = Gaussian(torch.tensor(mu), torch.tensor(std).unsqueeze(1))
    assert law.log_prob(torch.tensor(x), "mean").tolist() == pytest.approx(expected, rel=1e-6)
    total = [3 * value for value in expected]
    assert law.log_prob(torch.tensor(x), "sum").tolist() == pytest.approx(total, rel=1e-6)


def test_the_loss_is_ddpos() -> None:
    """mean(max(-A r, -A clip(r))) with r below, inside and above the range, for both signs of A."""
    log_ratios = [-3e-4, 5e-5, 3e-4] * 2
    advantages = [2.0, 1.0, 0.5, -2.0, -1.0, -0.5]
    losses = []
    for log_ratio, advantage in zip(log_ratios, advantages, strict=True):
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        losses.append(max(-advantage * ratio, -advantage * clipped))
    old = torch.full((6,), -1.25, dtype=torch.float64)
    new = old + torch.tensor(log_ratios, dtype=torch.float64)
    found = importance_sampling(new, old, torch.tensor(advantages, dtype=torch.float64), CLIP)
    assert found.tolist() == pytest.approx(losses, rel=1e-12)
    assert float(found.mean()) == pytest.approx(5e-4 / 6, rel=1e-3)


def test_the_clipped_side_has_no_gradient() -> None:
    log_ratios = torch.tensor([-3e-4, 3e-4, -3e-4, 3e-4], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    losses = importance_sampling(log_ratios, torch.zeros_like(advantages), advantages, CLIP)
    (grads,) = torch.autograd.grad(losses.sum(), log_ratios)
    expected = torch.where(
        torch.tensor([True, False, False, True]), -advantages * log_ratios.exp().detach(), 0
    )
    torch.testing.assert_close(grads, expected)


def test_both_estimators_agree_at_the_policy_that_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(2, 64, generator=generator)
    new = old.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(losses.sum(), new)[0]
        for losses in (
            importance_sampling(new, old, advantages, CLIP),
            score_function(new, advantages),
        )
    ]
    assert torch.equal(*gradients) and torch.equal(gradients[0], -advantages)


def test_what_is_logged() -> None:
    old = torch.zeros(3, dtype=torch.float64)
    new = torch.tensor([0.0, 0.1, -0.1], dtype=torch.float64, requires_grad=True)
    values = ratio_values(new, old, 0.1, on_policy=False)
    assert not any(value.requires_grad for value in values.values())
    assert values["ratio"].tolist() == pytest.approx([1, math.exp(0.1), math.exp(-0.1)])
    assert values["ratio_deviation"].tolist() == pytest.approx([0, 0.1051709, 0.0951626], abs=1e-6)
    assert values["clip_fraction"].tolist() == [0, 1, 0]
    assert values["approx_kl"].tolist() == pytest.approx([0, 0.005, 0.005])
    assert torch.equal(values["ratio_deviation_max"], values["ratio_deviation"])
    first = ratio_values(new, old, 0.1, on_policy=True)
    assert set(first) - set(values) == {"first_ratio_deviation_max"}
