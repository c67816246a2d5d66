"""Flows along arcs: exact for normal data, first order for others, losses by hand."""

import math

import pytest
import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import AngularFlow, GaussianProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.subspace import PointClouds

ROWS = Condition([{"i": 0}], {}, torch.zeros(5, dtype=torch.int64))


def velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """Return E[dx/dphi | x] for data of N(mean, std^2)."""
    cos, sin = torch.cos(math.pi / 2 * t[:, None]), torch.sin(math.pi / 2 * t[:, None])
    slope = sin * cos * (1 - std**2) / (cos**2 * std**2 + sin**2)
    return slope * (x - cos * mean) - sin * mean


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8), (-1.0, 1.5)])
def test_gaussian_data_are_reached_at_first_order(mean: float, std: float) -> None:
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, errors = mean + std * noise, []
    for num_steps in (40, 80):
        found = Sampler(num_steps).sample(
            lambda x, t, _: velocity(x, t, mean, std), AngularFlow(), noise, ROWS
        )
        errors.append(float((found - exact).abs().max()))
    if std == 1.0:
        assert max(errors) < 1e-12  # in any number of steps
    else:
        assert 0 < errors[1] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("num_steps", "loss"), [(5, 0.23), (10, 0.12)])
def test_what_straight_paths_lose_of_normal_data(num_steps: int, loss: float) -> None:
    """The figures of the class: Euler's steps on the exact velocity shrink N(0, 1)."""
    noise = torch.ones(5, 1, dtype=torch.float64)

    def straight(x: Tensor, t: Tensor, _: Condition) -> Tensor:
        return ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None] * x

    flow = GaussianProcess(RectifiedFlow(), "velocity")
    found = Sampler(num_steps).sample(straight, flow, noise, ROWS)
    assert 1 - found[0].item() == pytest.approx(loss, abs=0.005)


def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    process, zero, t = AngularFlow(), torch.zeros(5), torch.linspace(0.1, 1.0, 5)
    x_0 = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    x_t = process.noised(x_0, zero, t, generators(range(5)))
    cos, sin = torch.cos(math.pi / 2 * t[:, None]), torch.sin(math.pi / 2 * t[:, None])
    noise = (x_t - cos * x_0) / sin
    guess = torch.zeros_like(x_0)
    expected = (cos * noise - sin * x_0).square().mean(dim=1)
    torch.testing.assert_close(process.loss(guess, x_0, x_t, zero, t), expected)


def test_steps_stay_in_the_subspace_and_noisy_ones_are_the_general_ones() -> None:
    full = torch.tensor([True, True, True, False])
    blank = full[None, :, None].expand(5, -1, 3).float()
    process = AngularFlow(PointClouds(num_coordinates=3))
    x, t = process.prior(blank).sample(generators(range(5))), torch.full((5,), 0.5)
    law = process.transition(torch.randn(5, 4, 3), x, t, t - 0.25, 0.0)
    assert not law.mean[:, 3].any() and law.mean.sum(dim=1).abs().max() < 1e-5
    general = GaussianProcess(process.schedule, "v", process.subspace)
    args = (torch.randn(5, 4, 3), x, t, t - 0.25, 1.0)
    mine, other = (p.transition(*args) for p in (process, general))
    state = x + 0.1
    torch.testing.assert_close(mine.log_prob(state), other.log_prob(state))
