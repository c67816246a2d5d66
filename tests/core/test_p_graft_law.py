r"""The law that P-GRAFT shapes, on p_ref = N(0, 1) with r(x) = x and top-1 of 4.

The reference's exact denoiser is :math:`E[\epsilon | x_t] = \sigma_t x_t`. Accepted x_0 have
density 4 Phi(x)^3 phi(x), mean 1.0294. With the ancestral sampler (x_tau, x_0) is jointly normal
with correlation sqrt(abar_tau); with the ODE x_tau is a deterministic, linear function of x_0.
"""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.sampling import walk
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.selection import TopK

SCHEDULE = DiscreteVP(vp_betas(), spacing="trailing")
PROCESS = GaussianProcess(SCHEDULE, "epsilon")
NUM_GROUPS, NUM_STEPS = 10_000, 200
ACCEPTED_MEAN = 1.0294
ABAR = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
LEVELS = {0.1: 0.896, 0.25: 0.675, 0.5: 0.278, 0.75: 0.057}
TAU = 0.25
GRID = np.linspace(-8, 8, 1601)


def reference(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return SCHEDULE.sigma(t).unsqueeze(1) * x


def conditions(num: int) -> Condition:
    return Condition([{}], {}, torch.zeros(num, dtype=torch.int64))


def index_of(level: float) -> int:
    return round((1 - level) * NUM_STEPS)


@functools.cache
def accepted(eta: float) -> dict[float, Tensor]:
    """Accepted states [G, 1] at each of LEVELS and at 0: top-1 of 4 by r(x_0)."""
    torch.manual_seed(int(10 * eta))
    times = PROCESS.times(NUM_STEPS)
    x_1 = torch.randn(4 * NUM_GROUPS, 1, dtype=torch.float64)
    wanted = {index_of(level): level for level in (*LEVELS, 0.0)}
    kept: dict[float, Tensor] = {}
    for i, x in walk(reference, PROCESS, x_1, conditions(len(x_1)), times, eta):
        if i in wanted:
            assert times[i].item() == pytest.approx(wanted[i])
            kept[wanted[i]] = x
    chosen = TopK(1)(kept[0.0].reshape(NUM_GROUPS, 4)).flatten()
    return {level: x[chosen] for level, x in kept.items()}


def completed(x: Tensor, level: float) -> Tensor:
    """The reference's own completion of x at a level, eta = 1."""
    torch.manual_seed(2)
    times = PROCESS.times(NUM_STEPS)[index_of(level) :]
    *_, (_, x_0) = walk(reference, PROCESS, x, conditions(len(x)), times, 1.0)
    assert isinstance(x_0, Tensor)
    return x_0


def ode_scale(level: float) -> float:
    """Standard deviation at a level of the eta = 0 chain that starts at N(0, 1)."""
    angles = np.arccos(np.sqrt(np.append(ABAR[999 :: -1000 // NUM_STEPS], 1.0)))
    return float(np.cos(np.diff(angles))[: index_of(level)].prod())


def accepted_density(eta: float) -> np.ndarray:
    """Density of the accepted x_tau on GRID, by quadrature."""
    if eta == 0:
        scale = ode_scale(TAU)
        return 4 * stats.norm.cdf(GRID / scale) ** 3 * stats.norm.pdf(GRID / scale) / scale
    abar = ABAR[round(1000 * TAU) - 1]
    x_0 = np.sqrt(abar) * GRID[:, None] + np.sqrt(1 - abar) * GRID
    acceptance = integrate.simpson(4 * stats.norm.cdf(x_0) ** 3 * stats.norm.pdf(GRID), x=GRID)
    return stats.norm.pdf(GRID) * acceptance


def denoiser_of(density: np.ndarray, x_t: Tensor, t: float) -> Tensor:
    """E[eps* | x_t] = sigma_t (x_t - r E[x_tau | x_t]) / v of x_tau ~ density, by quadrature."""
    abar_t, abar = ABAR[round(1000 * t) - 1], ABAR[round(1000 * TAU) - 1]
    r, v = np.sqrt(abar_t / abar), 1 - abar_t / abar
    x = np.linspace(float(x_t.min()), float(x_t.max()), 400)
    weights = density * np.exp(-0.5 * (x[:, None] - r * GRID) ** 2 / v)
    mean = (weights @ GRID) / weights.sum(axis=1)
    exact = np.sqrt(1 - abar_t) * (x - r * mean) / v
    return torch.from_numpy(np.interp(x_t.numpy(), x, exact))


def z_scores(density: np.ndarray, x_s: Tensor, s: float, t: float) -> np.ndarray:
    """The loss's mean gradient at the exact denoiser in 10 bins of x_t, in standard errors.

    A histogram regression of the target on x_t has its minimum where all are 0.
    """
    low, high = (torch.full((len(x_s),), level, dtype=torch.float64) for level in (s, t))
    x_t = PROCESS.noised(x_s, low, high)
    prediction = denoiser_of(density, x_t, t).requires_grad_()
    loss = PROCESS.loss(prediction, x_s, x_t, low, high)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    order = x_t.flatten().argsort()
    bins = [gradient.flatten()[rows] for rows in order.tensor_split(10)]
    return np.array([float(g.mean() / (g.std() / len(g) ** 0.5)) for g in bins])


@pytest.mark.parametrize(("level", "abar"), LEVELS.items())
def test_accepted_states_and_their_completion(level: float, abar: float) -> None:
    """Means within 4 standard errors plus 0.02 for the 200 steps of the sampler."""
    signal = SCHEDULE.alpha(torch.tensor(level)).item() ** 2
    assert signal == pytest.approx(abar, abs=6e-4)
    x_t = accepted(1.0)[level]
    error = x_t.std().item() / NUM_GROUPS**0.5
    exact = math.sqrt(signal) * ACCEPTED_MEAN
    assert x_t.mean().item() == pytest.approx(exact, abs=4 * error + 0.02)
    x_0 = completed(x_t, level)
    error = x_0.std().item() / NUM_GROUPS**0.5
    assert x_0.mean().item() == pytest.approx(signal * ACCEPTED_MEAN, abs=4 * error + 0.02)


def test_later_cuts_give_away_less_reward() -> None:
    means = [completed(accepted(1.0)[level], level).mean().item() for level in sorted(LEVELS)]
    assert accepted(1.0)[0.0].mean() > means[0] > means[1] > means[2] > means[3]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("t", [0.252, 0.3, 0.5, 0.9])
def test_intermediate_target_fits_the_accepted_law(eta: float, t: float) -> None:
    """For either sampler: all of 10 bins within 4 standard errors."""
    torch.manual_seed(1)
    z = z_scores(accepted_density(eta), accepted(eta)[TAU], TAU, t)
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("t", [0.252, 0.3, 0.5, 0.9])
def test_clean_target_fits_the_accepted_law_of_the_ancestral_sampler(t: float) -> None:
    """Noising the accepted x_0 gives the accepted x_t: all of 10 bins within 4 standard errors."""
    torch.manual_seed(1)
    z = z_scores(accepted_density(1.0), accepted(1.0)[0.0], 0.0, t)
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("t", [0.252, 0.3, 0.5])
def test_clean_target_misses_the_accepted_law_of_the_ode(t: float) -> None:
    torch.manual_seed(1)
    z = z_scores(accepted_density(0.0), accepted(0.0)[0.0], 0.0, t)
    assert np.abs(z).max() > 8


def test_ode_keeps_the_accepted_mean_that_noising_loses() -> None:
    """Exact: the ODE of N(0, 1) is the identity; 200 steps shrink it by ode_scale."""
    assert 0.99 < ode_scale(0.0) < ode_scale(TAU) < 1
    x_tau, x_0 = accepted(0.0)[TAU], accepted(0.0)[0.0]
    torch.testing.assert_close(x_0, x_tau * (ode_scale(0.0) / ode_scale(TAU)), rtol=1e-6, atol=0)
    error = x_tau.std().item() / NUM_GROUPS**0.5
    exact = ode_scale(TAU) * ACCEPTED_MEAN
    assert x_tau.mean().item() == pytest.approx(exact, abs=4 * error)
    torch.manual_seed(1)
    zero, tau = torch.zeros(NUM_GROUPS), torch.full((NUM_GROUPS,), TAU)
    renoised = PROCESS.noised(x_0, zero, tau)
    markov = math.sqrt(ABAR[249]) * ode_scale(0.0) * ACCEPTED_MEAN
    error = renoised.std().item() / NUM_GROUPS**0.5
    assert renoised.mean().item() == pytest.approx(markov, abs=4 * error)
    gap = (1 - math.sqrt(ABAR[249])) * ACCEPTED_MEAN  # 0.183 in the limit of many steps
    assert exact - markov == pytest.approx(gap, abs=0.005)
