import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats

from lit_rlft.core.checks import UsageError
from lit_rlft.core.schedule import (
    CosineVP,
    DiscreteVP,
    PolynomialVP,
    RectifiedFlow,
    Schedule,
    vp_betas,
)

SCHEDULES: list[Schedule] = [
    DiscreteVP(vp_betas()),
    CosineVP(),
    CosineVP(min_alpha=0.01),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
    PolynomialVP(),
]


def ids(schedule: Schedule) -> str:
    return type(schedule).__name__


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_signal_falls_and_noise_rises_from_clean_data(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 101)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    kept = alpha if isinstance(schedule, RectifiedFlow) else alpha**2
    gained = sigma if isinstance(schedule, RectifiedFlow) else sigma**2
    torch.testing.assert_close(kept + gained, torch.ones_like(kept))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_grid_starts_at_noise_and_ends_at_data(schedule: Schedule, num_steps: int) -> None:
    times = schedule.times(num_steps)
    assert times.shape == (num_steps + 1,) and times.dtype == torch.float64
    assert (times.diff() < 0).all() and times[-1] == 0
    if not isinstance(schedule, DiscreteVP):
        assert times[0] == 1


def test_vp_betas_are_those_of_diffusers() -> None:
    for kind, start, end in itertools.product(["linear", "scaled_linear"], [1e-4], [0.012, 0.02]):
        scheduler = DDIMScheduler(beta_schedule=kind, beta_start=start, beta_end=end)
        assert torch.equal(vp_betas(1000, start, end, kind), scheduler.betas)


def test_signal_of_stable_diffusion() -> None:
    # Recomputed in numpy's float64; the table itself is float32's, as diffusers'.
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    schedule = DiscreteVP(vp_betas())
    t = torch.tensor([0.1, 0.25, 0.5, 0.75], dtype=torch.float64)
    signal = schedule.alpha(t) ** 2
    exact = np.cumprod(1 - betas)[[99, 249, 499, 749]]
    np.testing.assert_allclose(signal.numpy(), exact, rtol=2e-5)
    np.testing.assert_allclose(signal.numpy(), [0.896, 0.675, 0.278, 0.057], atol=6e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_discrete_grid_is_that_of_diffusers(
    spacing: str, steps_offset: int, ends_at_zero: bool
) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, steps_offset=steps_offset, set_alpha_to_one=ends_at_zero
    )
    schedule = DiscreteVP(
        scheduler.betas, spacing=spacing, steps_offset=steps_offset, ends_at_zero=ends_at_zero
    )
    for num_steps in (1, 2, 7, 20, 30, 50, 333):
        scheduler.set_timesteps(num_steps)
        times = schedule.times(num_steps)
        assert torch.equal(schedule.timestep(times[:-1]), scheduler.timesteps)
        signal = schedule.alpha(times) ** 2
        exact = scheduler.alphas_cumprod[scheduler.timesteps].double()
        torch.testing.assert_close(signal[:-1], exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(signal[-1], scheduler.final_alpha_cumprod.double())


def test_discrete_table_survives_casts() -> None:
    schedule = DiscreteVP(vp_betas())
    exact = schedule.alpha_bar.clone()
    for cast in (schedule.half(), schedule.to(torch.bfloat16), schedule.float()):
        assert cast.alpha_bar.dtype == torch.float64
        assert torch.equal(cast.alpha_bar, exact)
    assert not schedule.state_dict()


def test_levels_between_the_entries_are_geometric_means() -> None:
    schedule = DiscreteVP(vp_betas())
    table = schedule.alpha_bar
    for below in (0, 1, 500, 999):
        between = schedule.alpha(torch.tensor((below + 0.5) / 1000, dtype=torch.float64)) ** 2
        assert between.item() == pytest.approx((table[below] * table[below + 1]).sqrt().item())
    assert schedule.sigma(torch.tensor(1e-9, dtype=torch.float64)) > 0


def test_table_may_end_without_signal() -> None:
    betas = DDIMScheduler(rescale_betas_zero_snr=True).betas
    schedule = DiscreteVP(betas, spacing="trailing")
    alpha, sigma = schedule.alpha(schedule.times(20)), schedule.sigma(schedule.times(20))
    assert alpha[0] == 0 and sigma[0] == 1 and alpha[-1] == 1 and sigma[-1] == 0
    assert (alpha.diff() > 0).all() and alpha.isfinite().all()


def test_network_times_are_table_indices() -> None:
    schedule = DiscreteVP(vp_betas())
    t = torch.arange(1, 1001) / 1000
    assert torch.equal(schedule.timestep(t), torch.arange(1000))
    assert torch.equal(schedule.timestep(t.double()), torch.arange(1000))


def test_discrete_training_times_are_uniform_over_the_levels_above_low() -> None:
    schedule = DiscreteVP(vp_betas(num_levels=20))
    for low, first in ((0.0, 1), (0.25, 6), (0.95, 20)):
        uniform = (torch.arange(20_000) + 0.5) / 20_000
        levels = (schedule.draw_times(uniform, low) * 20).round().long()
        counts = torch.bincount(levels, minlength=21)
        assert (counts[:first] == 0).all()
        assert counts[first:].max() - counts[first:].min() <= 1
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert schedule.draw_times(edge, 0.25).tolist() == [0.3, 1.0]
    # Samplers that step x_t / alpha_t have levels between the entries.
    for low in (5.4 / 20, 5.6 / 20):
        assert float(schedule.draw_times(edge, low).min()) == pytest.approx(6 / 20)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("low", [0.0, 0.25, 0.75])
def test_training_times_lie_above_low(schedule: Schedule, low: float) -> None:
    t = schedule.draw_times(torch.tensor([0.0, 0.3, 0.999, 1 - 2**-24]), low)
    assert t.dtype == torch.float64
    assert (t > low).all() and (t <= 1).all()


def test_shifted_training_times_have_the_logistic_density() -> None:
    # t = 3 u / (1 + 2 u) with u uniform: P(t <= x) = x / (3 - 2 x); restricted to t > low.
    low = 0.4
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    t = RectifiedFlow(shift=3.0).draw_times(uniform, low).numpy()

    def cdf(x: np.ndarray) -> np.ndarray:
        whole = x / (3 - 2 * x)
        below = low / (3 - 2 * low)
        return (whole - below) / (1 - below)

    assert stats.kstest(t, cdf).pvalue > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_flow_grid_is_that_of_diffusers(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    times = RectifiedFlow(shift).times(num_steps)
    torch.testing.assert_close(times.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_knots_of_a_flow_give_a_grid_of_any_number_of_steps() -> None:
    """The literal times lie on the lines through (0, 1), the knots and (1, 0)."""
    schedule = RectifiedFlow(shift=0.5, knots=[(0.1, 0.4), (0.5, 0.2)])
    wanted = {
        1: [1, 0],
        4: [1, 0.325, 0.2, 0.1, 0],
        10: [1, 0.4, 0.35, 0.3, 0.25, 0.2, 0.16, 0.12, 0.08, 0.04, 0],
    }
    for num_steps, times in wanted.items():
        found = schedule.times(num_steps)
        assert found.dtype == torch.float64 and (found[0], found[-1]) == (1, 0)
        torch.testing.assert_close(found, torch.tensor(times, dtype=torch.float64))
    # Training times are the shifted ones all the same.
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(schedule.draw_times(uniform), RectifiedFlow(0.5).draw_times(uniform))


@pytest.mark.parametrize(
    "knots", [[(0.5,)], [(0.0, 0.5)], [(0.5, 0.0)], [(0.5, 1.0)], [(0.2, 0.3), (0.6, 0.4)]]
)
def test_knots_that_do_not_go_down_are_refused(knots: list[tuple[float, float]]) -> None:
    with pytest.raises(UsageError, match=r"knots must be pairs of a share .* such as \[\[0\.2"):
        RectifiedFlow(knots=knots)
    with pytest.raises(UsageError, match="last must be left out where there are knots"):
        RectifiedFlow(last=0.1, knots=[(0.1, 0.4)])


def test_kept_signal_of_the_cosine_schedule() -> None:
    schedule = CosineVP(min_alpha=0.02)
    one = torch.ones(1)
    assert schedule.alpha(one).item() == pytest.approx(0.02, abs=1e-15)
    half = CosineVP().alpha(one / 2).item()
    assert half == pytest.approx(math.sqrt(0.5), abs=1e-15)


def test_settings_that_cannot_work_are_refused() -> None:
    for build in (
        lambda: RectifiedFlow(shift=0.0),
        lambda: CosineVP(min_alpha=1.0),
        lambda: DiscreteVP(vp_betas(10)).times(11),
        lambda: DiscreteVP(vp_betas(10)).times(0),
    ):
        with pytest.raises(UsageError):
            build()


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_the_polynomial_schedule_is_edms_table(power: float) -> None:
    # The published recipe: levels 0..T, ratios of neighbours of at least 0.001, then the precision.
    total, precision = 1000, 1e-5
    squares = [(1 - (i / total) ** power) ** 2 for i in range(total + 1)]
    table, before, product = [], 1.0, 1.0
    for square in squares:
        product *= min(max(square / before, 0.001), 1.0)
        before = square
        table.append((1 - 2 * precision) * product + precision)
    schedule = PolynomialVP(power, precision)
    levels = torch.arange(1, total + 1, dtype=torch.float64) / total
    alpha, sigma = schedule.levels(levels)
    wanted = torch.tensor(table[1:], dtype=torch.float64)
    torch.testing.assert_close(alpha**2, wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-12)
    clean = torch.zeros(1)
    assert schedule.alpha(clean) == 1 and schedule.sigma(clean) == 0
    for settings in ({"power": 0.0}, {"precision": 0.5}):
        with pytest.raises(UsageError, match=r"power must be pos|precision must be below"):
            PolynomialVP(**settings)


@pytest.mark.parametrize("shift", [0.5, 1.0])
@pytest.mark.parametrize("low", [0.0, 0.3])
def test_training_times_may_have_normal_logits(shift: float, low: float) -> None:
    """Quantiles of a normal law that is cut off below; a shift s adds log s to every logit."""
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    times = RectifiedFlow(shift, (-0.5, 1.2)).draw_times(uniform, low)
    assert times.min() > low and times.max() <= 1
    law = stats.norm(-0.5 + math.log(shift), 1.2)

    def below(t: float) -> float:
        return law.cdf(math.log(t / (1 - t))) if t else 0.0

    for t in (0.31, 0.5, 0.9):
        wanted = (below(t) - below(low)) / (1 - below(low))
        assert (times <= t).double().mean().item() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UsageError, match="logit_normal must be a mean and a standard deviation"):
        RectifiedFlow(logit_normal=(0.0, 0.0))


def test_levels_of_a_whole_batch_are_looked_up_without_a_warning() -> None:
    """They are one number, expanded, of which torch warns where it looks numbers up."""
    schedule = DiscreteVP(vp_betas())
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = schedule.timestep(torch.tensor(0.5, dtype=torch.float64).expand(3))
    finally:
        torch.set_warn_always(False)
    assert found.tolist() == [499] * 3
