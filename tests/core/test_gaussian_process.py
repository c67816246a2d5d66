import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import Mixture
from domains.gaussian_mixture.pipeline import GaussianMixtureDenoiser
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler, walk
from lit_rlft.core.schedule import (
    CosineVP,
    DiscreteVP,
    PolynomialVP,
    RectifiedFlow,
    Schedule,
    vp_betas,
)

SCHEDULES: dict[str, Schedule] = {
    "discrete": DiscreteVP(vp_betas()),
    "cosine": CosineVP(),
    "clipped_cosine": CosineVP(min_alpha=2e-3),
    "flow": RectifiedFlow(),
    "shifted_flow": RectifiedFlow(shift=3.0),
    "polynomial": PolynomialVP(),
}
TYPES = ("epsilon", "sample", "v", "velocity")
DIFFUSERS_TYPES = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
PAIRS = [
    (name, kind)
    for name, kind in itertools.product(SCHEDULES, TYPES)
    if kind != "epsilon" or name in ("discrete", "clipped_cosine", "polynomial")
]
CONDITION = Condition([{}], {}, torch.zeros(2500, dtype=torch.int64))


def process_of(name: str, kind: str) -> GaussianProcess:
    return GaussianProcess(SCHEDULES[name], kind)


def at(*levels: float) -> Tensor:
    return torch.tensor(levels, dtype=torch.float64)


def converted(kind: str, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The definition of each prediction type, written out once more."""
    return {
        "epsilon": eps,
        "sample": x_0,
        "v": alpha * eps - sigma * x_0,
        "velocity": eps - x_0,
    }[kind]


def levels(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs s < t, on the table of the discrete schedule."""
    for s, t in itertools.combinations((0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0), 2):
        yield at(s), at(t)


def split_noise(process: GaussianProcess, s: Tensor, t: Tensor) -> tuple[float, float]:
    """Return (ratio, std) of x_t = ratio x_s + std z, read off draws from one seed."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    z = torch.randn(1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = process.noised(zero, s, t, generators([3]))
    ratio = process.noised(one, s, t, generators([3])) - noise
    return ratio.item(), (noise / z).item()


@pytest.mark.parametrize("kind", DIFFUSERS_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_every_step_is_that_of_ddim(
    kind: str, spacing: str, steps_offset: int, ends_at_zero: bool
) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=DIFFUSERS_TYPES[kind],
        timestep_spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=ends_at_zero,
        clip_sample=False,
    )
    schedule = DiscreteVP(
        scheduler.betas, spacing=spacing, steps_offset=steps_offset, ends_at_zero=ends_at_zero
    )
    # Same table in double precision, so that formulas are compared and not roundings.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    process = GaussianProcess(schedule, kind)
    torch.manual_seed(0)
    for num_steps, eta in itertools.product((1, 7, 50), (0.0, 0.5, 1.0)):
        scheduler.set_timesteps(num_steps)
        for timestep in scheduler.timesteps.tolist():
            x, output, noise = torch.randn(3, 2, 4, dtype=torch.float64)
            step = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise)
            # diffusers steps by T // num_steps even where its own grid is not that regular.
            previous = timestep - 1000 // num_steps
            s = max(previous + 1, 0 if ends_at_zero else 1) / 1000
            t = at((timestep + 1) / 1000).expand(2)
            transition = process.transition(output, x, t, at(s).expand(2), eta)
            ours = transition.loc + transition.std * noise
            torch.testing.assert_close(ours, step.prev_sample, rtol=1e-9, atol=1e-9)
            x_0 = process.denoised(output, x, t)
            torch.testing.assert_close(x_0, step.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", DIFFUSERS_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_whole_trajectory_is_that_of_ddim_in_single_precision(
    kind: str, eta: float, ends_at_zero: bool
) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=DIFFUSERS_TYPES[kind],
        steps_offset=1,
        set_alpha_to_one=ends_at_zero,
        clip_sample=False,
    )
    schedule = DiscreteVP(scheduler.betas, steps_offset=1, ends_at_zero=ends_at_zero)
    process = GaussianProcess(schedule, kind)

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, dims=1)) * torch.cos(timestep / 300).unsqueeze(1)

    x_1 = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    ours = [
        x
        for _, x in walk(
            lambda x, t, condition: network(x, schedule.timestep(t)),
            process,
            x_1,
            CONDITION,
            process.times(20),
            eta,
        )
    ]
    torch.manual_seed(2)
    scheduler.set_timesteps(20)
    x = x_1
    for i, timestep in enumerate(scheduler.timesteps):
        noise = torch.randn_like(x) if eta else None
        x = scheduler.step(
            network(x, timestep.expand(3)), int(timestep), x, eta=eta, variance_noise=noise
        ).prev_sample
        torch.testing.assert_close(ours[i + 1], x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_step_is_that_of_flow_matching(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = GaussianProcess(RectifiedFlow(shift), "velocity")
    for num_steps in (1, 4, 28):
        scheduler.set_timesteps(num_steps)
        torch.manual_seed(0)
        for i, timestep in enumerate(scheduler.timesteps):
            x, output = torch.randn(2, 3, 5)
            t, s = scheduler.sigmas[i].expand(3), scheduler.sigmas[i + 1].expand(3)
            step = scheduler.step(output, timestep, x).prev_sample
            ours = process.transition(output, x, t, s, 0.0)
            torch.testing.assert_close(ours.mean, step, rtol=1e-5, atol=1e-6)
            assert not ours.std.any()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_ancestral_step_is_the_posterior(name: str, kind: str) -> None:
    # Reference: Bayes' rule for N(alpha_s x_0, sigma_s^2) and x_t | x_s, precisions adding.
    process, schedule = process_of(name, kind), SCHEDULES[name]
    x_0, eps = at(0.7).reshape(1, 1), at(-1.3).reshape(1, 1)
    for s, t in levels(name):
        alpha_s, sigma_s, alpha_t, sigma_t = (
            float(c) for c in (*coefficients(schedule, s), *coefficients(schedule, t))
        )
        x_t = alpha_t * x_0 + sigma_t * eps
        output = converted(kind, x_0, eps, at(alpha_t), at(sigma_t))
        ours = process.transition(output, x_t, t, s, 1.0)
        if sigma_s == 0:
            assert ours.std.item() == 0
            torch.testing.assert_close(ours.mean, x_0, rtol=1e-9, atol=1e-9)
            continue
        ratio = alpha_t / alpha_s
        likelihood = ratio**2 / (sigma_t**2 - (ratio * sigma_s) ** 2)
        variance = 1 / (1 / sigma_s**2 + likelihood)
        pull = alpha_s * x_0 / sigma_s**2
        pull = pull + (x_t * likelihood / ratio if ratio > 1e-12 else 0)
        assert ours.std.item() == pytest.approx(math.sqrt(variance), rel=1e-9)
        torch.testing.assert_close(ours.mean, variance * pull, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_transitions_keep_the_marginal_of_a_known_sample(name: str, kind: str, eta: float) -> None:
    # x_t ~ N(alpha_t x_0, sigma_t^2) must go to N(alpha_s x_0, sigma_s^2) for every eta.
    process, schedule = process_of(name, kind), SCHEDULES[name]
    x_0 = at(0.7).reshape(1, 1)
    for s, t in levels(name):
        alpha_t, sigma_t = coefficients(schedule, t)
        alpha_s, sigma_s = coefficients(schedule, s)
        means = []
        for eps in (at(0.0).reshape(1, 1), at(1.0).reshape(1, 1)):
            output = converted(kind, x_0, eps, alpha_t, sigma_t)
            step = process.transition(output, alpha_t * x_0 + sigma_t * eps, t, s, eta)
            means.append(step.mean)
        torch.testing.assert_close(means[0], alpha_s * x_0, rtol=1e-9, atol=1e-9)
        variance = (means[1] - means[0]) ** 2 + step.std**2
        torch.testing.assert_close(variance.flatten(), sigma_s**2, rtol=1e-8, atol=1e-12)


def coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return schedule.alpha(t), schedule.sigma(t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_kernel_composes(name: str) -> None:
    process = GaussianProcess(SCHEDULES[name], "v")
    for s, t, u in itertools.combinations((0.0, 0.1, 0.4, 0.75, 1.0), 3):
        (first, std_1), (second, std_2), (whole, std) = (
            split_noise(process, at(a), at(b)) for a, b in ((s, t), (t, u), (s, u))
        )
        assert first * second == pytest.approx(whole, rel=1e-9, abs=1e-12)
        assert (second * std_1) ** 2 + std_2**2 == pytest.approx(std**2, rel=1e-9)
    ratio, std = split_noise(process, at(0.0), at(0.75))
    alpha, sigma = coefficients(SCHEDULES[name], at(0.75))
    assert (ratio, std) == pytest.approx((alpha.item(), sigma.item()), rel=1e-9)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_native_loss_is_the_mean_squared_error(name: str, kind: str) -> None:
    process, schedule = process_of(name, kind), SCHEDULES[name]
    torch.manual_seed(0)
    x_0, eps, output = torch.randn(3, 6, 2, 3, dtype=torch.float64)
    t = at(0.001, 0.01, 0.1, 0.5, 0.9, 1.0)
    alpha, sigma = (c.reshape(-1, 1, 1) for c in coefficients(schedule, t))
    loss = process.loss(output, x_0, alpha * x_0 + sigma * eps, torch.zeros_like(t), t)
    native = (output - converted(kind, x_0, eps, alpha, sigma)).square().mean(dim=(1, 2))
    torch.testing.assert_close(loss, native, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_intermediate_target_has_the_exact_denoiser_as_expectation(name: str, kind: str) -> None:
    # x_0 ~ N(m, c^2): (x_0, x_s, x_t) is jointly Gaussian and the target linear in (x_s, x_t).
    process, schedule = process_of(name, kind), SCHEDULES[name]
    m, c = 0.4, 0.6
    zero, one = at(0.0).reshape(1, 1), at(1.0).reshape(1, 1)
    for s, t in levels(name):
        if schedule.sigma(s) == 0:
            continue
        alpha_t, sigma_t = coefficients(schedule, t)
        alpha_s, sigma_s = coefficients(schedule, s)
        from_s, from_t = process.target(one, zero, s, t), process.target(zero, one, s, t)
        variance_t = alpha_t**2 * c**2 + sigma_t**2
        variance_s = alpha_s**2 * c**2 + sigma_s**2
        for x_t in (at(-1.5).reshape(1, 1), at(0.8).reshape(1, 1)):
            offset = x_t - alpha_t * m
            x_s = alpha_s * m + alpha_t / alpha_s * variance_s / variance_t * offset
            x_0 = m + alpha_t * c**2 / variance_t * offset
            eps = sigma_t / variance_t * offset
            exact = converted(kind, x_0, eps, alpha_t, sigma_t)
            torch.testing.assert_close(from_s * x_s + from_t * x_t, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_weight_bounds_the_variance_of_the_target(name: str, kind: str) -> None:
    # As t -> s the target's variance given x_s explodes; weighted, it stays what it was.
    process, schedule = process_of(name, kind), SCHEDULES[name]
    zero, one = at(0.0).reshape(1, 1), at(1.0).reshape(1, 1)

    def variances(s: Tensor, t: Tensor) -> tuple[float, float]:
        _, std = split_noise(process, s, t)
        raw = (process.target(zero, one, s, t) * std).item() ** 2
        target = process.target(zero, zero, s, t)
        weight = process.loss(target + 1, zero, zero, s, t).item()
        return raw, weight * raw

    for s in (at(0.3), at(0.7)):
        gap = 1e-3 if name == "discrete" else 1e-6
        wide, near = variances(s, s + 0.2), variances(s, s + gap)
        alpha_t, sigma_t = coefficients(schedule, s + gap)
        assert near[0] > 50 * wide[0]
        # Per unit of epsilon, with x_t fixed; the motion of x_t itself is of the order of the gap.
        slope = converted(kind, -sigma_t / alpha_t, torch.ones_like(s), alpha_t, sigma_t)
        assert near[1] == pytest.approx(slope.item() ** 2, rel=20 * gap)


def test_prior_is_standard_normal() -> None:
    blank = torch.empty(3, 2, 5, dtype=torch.float64)
    prior = GaussianProcess(RectifiedFlow(), "velocity").prior(blank)
    exact = torch.distributions.Normal(torch.zeros(3, 2, 5).double(), 1.0)
    x = prior.sample()
    assert x.shape == (3, 2, 5) and x.dtype == torch.float64
    torch.testing.assert_close(prior.log_prob(x), exact.log_prob(x).sum(dim=(1, 2)))


@pytest.mark.parametrize("name", ["cosine", "flow", "shifted_flow"])
def test_epsilon_needs_signal_at_the_start(name: str) -> None:
    with pytest.raises(UsageError, match="epsilon"):
        GaussianProcess(SCHEDULES[name], "epsilon")
    with pytest.raises(UsageError, match="prediction_type"):
        GaussianProcess(SCHEDULES[name], "score")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_reach_prediction_and_state(kind: str) -> None:
    process = process_of("discrete", kind)
    x, output = torch.randn(2, 2, 3, requires_grad=True).unbind()
    t = torch.full((2,), 0.5)
    step = process.transition(output, x, t, t / 2, 0.0).mean
    grads = torch.autograd.grad(step.sum(), [x, output])
    assert all(grad.abs().min() > 0 for grad in grads)


MIXTURE = Mixture.of([0.5, 0.3, 0.2], [[-0.8, 0.8], [0.4, -1.4], [1.4, 0.1]], [0.25, 0.3, 0.35])


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] != "shifted_flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exact_denoiser_samples_the_mixture(name: str, kind: str, eta: float) -> None:
    """Weights, means and stds within 4 standard errors, plus a stated discretisation error.

    The ancestral step replaces x_0 by its mean, which loses variance of first order in the step:
    3 % of a std at 250 steps.
    """
    process = process_of(name, kind)
    denoiser = GaussianMixtureDenoiser(MIXTURE, process, residual_width=0).double()
    num = len(CONDITION)
    torch.manual_seed(0)
    with torch.no_grad():
        x_0 = Sampler(250, eta).sample(
            lambda x, t, condition: denoiser(x, t),
            process,
            torch.randn(num, 2, dtype=torch.float64),
            CONDITION,
        )
    component = MIXTURE.nearest(x_0)
    for k, (weight, mean, std) in enumerate(
        zip(MIXTURE.weights.tolist(), MIXTURE.means, MIXTURE.stds.tolist(), strict=True)
    ):
        points = x_0[component == k]
        size = len(points)
        assert size / num == pytest.approx(weight, abs=4 * np.sqrt(weight * (1 - weight) / num))
        off = (points.mean(dim=0) - mean).abs().max().item()
        assert off < 4 * std / np.sqrt(size) + 0.01
        measured = (points - mean).square().mean().sqrt().item()
        assert measured == pytest.approx(std, rel=4 / np.sqrt(4 * size) + 0.03)
