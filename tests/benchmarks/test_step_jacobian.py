"""Singular values of a sampler's step, and the gradient's norm by K, beside what is known."""

import math
from collections.abc import Callable
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor

from benchmarks.step_jacobian import (
    Cell,
    Pulled,
    Walk,
    geometric,
    largest_singular_value,
    mean_square,
    pulled,
)
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Quadratic
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT, DRTune, GradientMethod, GradientPlan
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.experience import Experience

T, BATCH, MANY = 6, 3, 1000
VARIANCES = torch.tensor([4.0, 1.0, 0.3, 0.01, 1e-4], dtype=torch.float64)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scale() -> Tensor:
    """The only weight of the linear denoiser."""
    return torch.ones((), dtype=torch.float64, requires_grad=True)


@pytest.fixture(scope="module")
def gaussian(scale: Tensor) -> Walk:
    """Data N(0, diag(VARIANCES)): the exact denoiser is linear, E[eps | x] = sigma x / var x_t."""
    process = GaussianProcess(DiscreteVP(vp_betas()))

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = process.schedule.levels(t)
        ratio = sigma[:, None] / (alpha[:, None] ** 2 * VARIANCES + sigma[:, None] ** 2)
        return scale * ratio * x_t

    condition = Condition([{}], {}, torch.zeros(MANY, dtype=torch.int64))
    x_1 = torch.randn(MANY, len(VARIANCES), dtype=torch.float64, generator=noise())
    return Walk(denoiser, process, x_1, condition, T)


def slopes(walked: Walk, i: int) -> Tensor:
    """Return the singular values of step i in closed form, [d]."""
    levels = torch.stack([walked.steps.t[i], walked.steps.s[i]])
    (alpha_t, alpha_s), (sigma_t, sigma_s) = walked.process.schedule.levels(levels)
    total = alpha_t**2 * VARIANCES + sigma_t**2
    return (alpha_s * alpha_t * VARIANCES + sigma_s * sigma_t) / total


def test_singular_values_of_gaussian_data(gaussian: Walk) -> None:
    for i in (0, T // 2, T - 1):
        known, step, x = slopes(gaussian, i), gaussian.step(i), gaussian.states[i]
        top = largest_singular_value(step, x, len(VARIANCES), noise(i))
        torch.testing.assert_close(top, known.max().expand(MANY))
        square = float(mean_square(step, x, 20, noise(i)).mean())
        assert square == pytest.approx(float(known.square().mean()), rel=0.02), i


def test_products_of_gaussian_data(gaussian: Walk, scale: Tensor) -> None:
    """From every step on: all of them, or what the sweep sees of one random vector a sample."""
    each = torch.stack([slopes(gaussian, i) for i in range(T)])
    known = each.flip(0).cumprod(dim=0).flip(0)
    function, x = gaussian.last(T), gaussian.states[0]
    top = largest_singular_value(function, x, len(VARIANCES), noise())
    torch.testing.assert_close(top, known[0].max().expand(MANY))
    reward = torch.zeros(MANY, len(VARIANCES), dtype=torch.float64)
    reward[:, 1] = 1
    found = pulled(gaussian, [scale], reward, noise())
    assert found.rms == pytest.approx(known.square().mean(dim=1).sqrt().tolist(), rel=0.03)
    assert found.along_reward == pytest.approx(known[:, 1].tolist())


@pytest.mark.parametrize("num_iterations", [1, 2, 5])
def test_iterations_rise_towards_the_largest(num_iterations: int) -> None:
    """A nearly flat spectrum, the hard case; more iterations than dimensions change nothing."""
    matrix = torch.diag(torch.tensor([1.0, 0.99, 0.98, 0.5], dtype=torch.float64))
    x = torch.zeros(1, 4, dtype=torch.float64)
    found = [
        float(largest_singular_value(lambda y: y @ matrix, x, n, noise()))
        for n in (num_iterations, num_iterations + 1)
    ]
    assert found[0] <= found[1] <= 1 + 1e-12
    assert num_iterations < 4 or found[0] == pytest.approx(1, abs=1e-12)


@pytest.fixture(scope="module")
def tuner() -> RewardGradient:
    made = RewardGradient(
        GaussianMixturePipeline(), Quadratic([0.5, 1.0]), method=DRTune(1, m=1), sampler=Sampler(T)
    )
    made.setup("fit")
    return made


@pytest.fixture(scope="module")
def mixture(tuner: RewardGradient) -> Walk:
    condition = tuner.pipeline.example().repeat(BATCH)
    x_1 = tensor_of(tuner.reference_prior(condition).sample(generators(range(BATCH))))
    assert isinstance(tuner.pipeline.process, GaussianProcess)
    return Walk(tuner.pipeline, tuner.pipeline.process, x_1, condition, T)


def dense(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian of each sample, by central differences in double precision, [B, d, d]."""
    columns = []
    for j in range(x.shape[1]):
        ahead, behind = x.clone(), x.clone()
        ahead[:, j] += 3e-3
        behind[:, j] -= 3e-3
        with torch.no_grad():
            columns.append((function(ahead) - function(behind)) / 6e-3)
    return torch.stack(columns, dim=2)


def test_singular_values_of_the_mixture(mixture: Walk) -> None:
    """Beside the dense Jacobian: not symmetric for a product of steps."""
    for function, x in ((mixture.step(3), mixture.states[3]), (mixture.last(T), mixture.states[0])):
        known = torch.linalg.svdvals(dense(function, x))
        top = largest_singular_value(function, x, 2, noise())
        torch.testing.assert_close(top, known[:, 0], rtol=0.01, atol=1e-3)


def test_mean_square_of_the_mixture(mixture: Walk) -> None:
    condition, x_1 = mixture.condition, mixture.states[0]
    many = (x_1.repeat_interleave(MANY, dim=0), condition.repeat(MANY))
    repeated = Walk(mixture.denoiser, mixture.process, *many, T)
    known = torch.linalg.svdvals(dense(mixture.last(T), x_1)).square().mean(dim=1)
    squares = mean_square(repeated.last(T), many[0], 16, noise()).view(BATCH, MANY)
    torch.testing.assert_close(squares.mean(dim=1), known, rtol=0.05, atol=1e-3)


@pytest.fixture(scope="module")
def swept(tuner: RewardGradient, mixture: Walk) -> Pulled:
    x_0 = mixture.states[-1].detach().requires_grad_()
    rewards = tuner.reward(x_0, mixture.condition)
    (gradient,) = torch.autograd.grad(-rewards.mean(), x_0)
    return pulled(mixture, list(tuner.trainable().parameters()), gradient, noise())


def norm_of(tuner: RewardGradient, mixture: Walk, method: GradientMethod) -> float:
    """Return the norm that the trainer's loss gives, by autograd through its walk."""
    tuner.method, weights = method, list(tuner.trainable().parameters())
    experience = Experience({}, mixture.condition, list(range(BATCH)))
    losses, _ = tuner.loss(experience, generators(range(BATCH)))
    grads = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
    return float(torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None]))


@pytest.mark.parametrize("detach_input", [False, True])
def test_norms_are_those_of_the_trainer(
    tuner: RewardGradient, mixture: Walk, swept: Pulled, detach_input: bool
) -> None:
    """Of DRaFT-K, with attached and with detached inputs."""
    found = swept.detached if detach_input else swept.attached
    for k in (1, 2, T):
        method = DRaFT(k)
        method.detach_input = detach_input
        assert found[k - 1] == pytest.approx(norm_of(tuner, mixture, method), rel=1e-4), k


class Fixed(DRaFT):
    """Trains given steps, 1 the last, with detached inputs."""

    detach_input = True

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = frozenset(steps)

    def draw(self, num_steps: int, generator: torch.Generator) -> GradientPlan:
        return GradientPlan(self.steps)


def test_spaced_steps_are_those_of_drtune(
    tuner: RewardGradient, mixture: Walk, swept: Pulled
) -> None:
    assert list(swept.spaced) == [1, 2, 5]
    norms = [norm_of(tuner, mixture, Fixed(first, first + T // 2)) for first in (1, 2, 3)]
    assert swept.spaced[2] == pytest.approx(geometric_mean(norms), rel=1e-4)
    assert DRTune(2, m=1)._from(1, 1, T // 2).trained == {1, 1 + T // 2}


def test_cells() -> None:
    assert Cell.of("shapes:16", 1) == Cell("shapes", 16, 7.5, 1)
    assert Cell.of("pictures:32", 0).guidance == 1
    assert Cell.of("random:64:1", 0).title == "random 64 x 64"
    with pytest.raises(SystemExit, match="models are shapes"):
        Cell.of("sd15", 0)


def test_geometric_mean_and_its_interval() -> None:
    """Logs -1, 0, 1 and 4: mean 1, deviation sqrt(14 / 3); t of 3 degrees at 0.975 is 3.1824."""
    found = geometric([math.exp(x) for x in (-1, 0, 1, 4)])
    reach = 3.18245 * (14 / 3 / 4) ** 0.5
    expected = [math.exp(1), math.exp(1 - reach), math.exp(1 + reach)]
    assert list(found) == pytest.approx(expected, rel=1e-4)
