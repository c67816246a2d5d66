"""Laws on point clouds against dense multivariate normals, and processes that live there."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import (
    GaussianProcess,
    MaskedProcess,
    PredictionType,
    ProductProcess,
)
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP, PolynomialVP, RectifiedFlow
from lit_rlft.core.subspace import PointCloudGaussian, PointClouds

SPACE = PointClouds(num_coordinates=3)
SIZES = (4, 1, 2, 6)  # points of each sample, in six slots
SLOTS, CHANNELS = 6, 5
PROCESSES = {
    "flow": GaussianProcess(RectifiedFlow(), "velocity", SPACE),
    "cosine": GaussianProcess(CosineVP(), "v", SPACE),
    "polynomial": GaussianProcess(PolynomialVP(), "epsilon", SPACE),
}


def full() -> Tensor:
    return torch.arange(SLOTS) < torch.tensor(SIZES).unsqueeze(1)


def blank(channels: int = CHANNELS) -> Tensor:
    return full().unsqueeze(-1).expand(-1, -1, channels).double()


def cloud(seed: int, channels: int = CHANNELS) -> Tensor:
    """A state in the subspace, made without the code under test."""
    torch.manual_seed(seed)
    x = torch.randn(len(SIZES), SLOTS, channels, dtype=torch.float64)
    for row, size in zip(x, SIZES, strict=True):
        row[size:] = 0
        row[:size, :3] -= row[:size, :3].mean(dim=0)
    return x


def stds(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return 0.5 + torch.rand(len(SIZES), SLOTS, CHANNELS, dtype=torch.float64)


def basis(size: int) -> Tensor:
    """Orthonormal columns [size * CHANNELS, d] of the free directions of one sample's points."""
    centred = torch.eye(size, dtype=torch.float64) - 1 / size
    columns = []
    for channel in range(CHANNELS):
        within = torch.linalg.svd(centred)[0][:, : size - 1] if channel < 3 else torch.eye(size)
        for direction in within.double().T:
            column = torch.zeros(size, CHANNELS, dtype=torch.float64)
            column[:, channel] = direction
            columns.append(column.flatten())
    return torch.stack(columns, dim=1)


def dense(law: PointCloudGaussian, i: int) -> tuple[MultivariateNormal, Tensor]:
    """Return the law of one sample in an orthonormal basis of its subspace, and the basis."""
    q, size = basis(SIZES[i]), SIZES[i]
    std = law.std.expand_as(law.loc)[i, :size].flatten()
    loc = law.loc[i, :size].flatten()
    return MultivariateNormal(q.T @ loc, q.T @ torch.diag(std**2) @ q), q


@pytest.mark.parametrize("isotropic", [True, False])
def test_log_prob_kl_and_entropy_are_those_of_the_dense_normal(isotropic: bool) -> None:
    first, second = stds(1), stds(2)
    if isotropic:
        first, second = first[:, :1, :1], second[:, :1, :1]
    ours = SPACE.gaussian(cloud(3), first, blank())
    theirs = SPACE.gaussian(cloud(4), second, blank())
    x = cloud(5)
    for i, size in enumerate(SIZES):
        (p, q), (other, _) = dense(ours, i), dense(theirs, i)
        dimensions = 3 * (size - 1) + 2 * size
        assert ours.num_dimensions[i] == q.shape[1] == dimensions
        log_prob = p.log_prob(q.T @ x[i, :size].flatten())
        torch.testing.assert_close(ours.log_prob(x)[i], log_prob)
        torch.testing.assert_close(ours.log_prob(x, "mean")[i], log_prob / dimensions)
        torch.testing.assert_close(ours.kl(theirs)[i], kl_divergence(p, other))
        torch.testing.assert_close(ours.kl(theirs, "mean")[i], kl_divergence(p, other) / dimensions)
        torch.testing.assert_close(ours.entropy()[i], p.entropy())
    assert ours.kl(ours).abs().max() < 1e-12


def test_unit_noise_has_the_density_of_its_dimensions() -> None:
    x = cloud(0)
    law = PROCESSES["flow"].prior(blank())
    dimensions = torch.tensor([3.0 * (n - 1) + 2 * n for n in SIZES])
    wanted = -0.5 * x.square().sum(dim=(1, 2)) - 0.5 * math.log(2 * math.pi) * dimensions
    torch.testing.assert_close(law.log_prob(x), wanted.double())


def test_samples_have_the_projected_covariance() -> None:
    std = stds(1)
    law = SPACE.gaussian(cloud(2), std, blank())
    torch.manual_seed(0)
    draws = torch.stack([law.sample() for _ in range(4000)])
    assert not draws[:, ~full()].any()
    centred = draws - law.loc
    for i, size in enumerate(SIZES):
        for channel in range(CHANNELS):
            found = torch.cov(centred[:, i, :size, channel].T).reshape(size, size)
            project = torch.eye(size, dtype=torch.float64) - (1 / size if channel < 3 else 0)
            wanted = project @ torch.diag(std[i, :size, channel] ** 2) @ project
            # Four standard errors of a covariance from 4,000 draws.
            assert (found - wanted).abs().max() < 4 * 2**0.5 * 2.25 / 4000**0.5
    sums = draws[..., :3].sum(dim=2)
    assert sums.abs().max() < 1e-12


def test_empty_slots_change_nothing() -> None:
    std, x = stds(1), cloud(3)
    wide = SPACE.gaussian(cloud(2), std, blank())
    for i, size in enumerate(SIZES):
        rows = slice(i, i + 1)
        narrow = SPACE.gaussian(
            cloud(2)[rows, :size], std[rows, :size], torch.ones(1, size, CHANNELS)
        )
        torch.testing.assert_close(narrow.log_prob(x[rows, :size]), wide.log_prob(x)[rows])
    # Whatever lies in empty slots of a mean or an argument counts for nothing.
    junk = cloud(2) + 7 * (~full()).unsqueeze(-1)
    assert torch.equal(SPACE.gaussian(junk, std, blank()).loc, wide.loc)
    torch.testing.assert_close(wide.log_prob(x + 7 * (~full()).unsqueeze(-1)), wide.log_prob(x))


def test_a_std_of_0_is_a_point_mass() -> None:
    std = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1).double()
    law = SPACE.gaussian(cloud(1), std, blank())
    x = law.sample()
    assert torch.equal(x[0], law.loc[0]) and not torch.equal(x[3], law.loc[3])
    assert law.log_prob(x)[[0, 2]].tolist() == law.kl(law)[[0, 2]].tolist() == [0, 0]
    assert law.log_prob(x)[3] != 0


def test_log_prob_and_kl_have_finite_gradients_everywhere() -> None:
    loc, log_std = cloud(1).requires_grad_(), stds(2).log().requires_grad_()
    law = SPACE.gaussian(loc, log_std.exp(), blank())
    base = PROCESSES["flow"].prior(blank())
    (law.log_prob(cloud(3)).sum() + law.kl(base).sum()).backward()
    for values in (loc, log_std):
        assert values.grad is not None and values.grad.isfinite().all()
        assert values.grad[full()].any() and not values.grad[~full()].any()


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_exact_denoisers_sample_the_law_in_the_subspace(name: str, eta: float) -> None:
    """Data N(0, 0.7^2) in the subspace: the variance of free numbers within four standard errors.

    The error of 200 steps adds 1 %.
    """
    process, std, num = PROCESSES[name], 0.7, 500
    alike = torch.ones(num, 4, CHANNELS, dtype=torch.float64)
    alike[:, 3] = 0  # three points, 3 * 2 + 2 * 3 = 12 dimensions

    def exact(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (level.view(-1, 1, 1) for level in process.schedule.levels(t))
        variance = alpha**2 * std**2 + sigma**2
        x_0, eps = alpha * std**2 / variance * x_t, sigma / variance * x_t
        return process.prediction(x_0, eps, t)

    torch.manual_seed(0)
    x_1 = process.prior(alike).sample()
    condition = Condition([{}], {}, torch.zeros(num, dtype=torch.int64))
    x_0 = Sampler(200, eta).sample(exact, process, x_1, condition)
    assert isinstance(x_0, Tensor)
    assert x_0[..., :3].sum(dim=1).abs().max() < 1e-12 and not x_0[:, 3].any()
    found = x_0.square().sum() / (12 * num)
    assert found.item() == pytest.approx(std**2, rel=4 * (2 / (12 * num)) ** 0.5 + 0.01)


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_are_means_over_free_dimensions(name: str) -> None:
    process, x_0 = PROCESSES[name], cloud(1)
    s, t = torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.6, dtype=torch.float64)
    x_t = process.noised(x_0, s, t, generators(range(4)))
    assert not x_t[~full()].any() and x_t[..., :3].sum(dim=1).abs().max() < 1e-12
    alpha, sigma = (level.view(-1, 1, 1) for level in process.schedule.levels(t))
    eps = (x_t - alpha * x_0) / sigma
    target = process.prediction(x_0, eps, t)
    error = cloud(2)
    loss = process.loss(target + error, x_0, x_t, s, t)
    dimensions = torch.tensor([3.0 * (n - 1) + 2 * n for n in SIZES])
    torch.testing.assert_close(loss, error.square().sum(dim=(1, 2)) / dimensions)
    # A common shift and values in empty slots are no error.
    shift = torch.zeros(CHANNELS, dtype=torch.float64)
    shift[:3] = 5.0
    wrong = target + error + shift + 9 * (~full()).unsqueeze(-1)
    torch.testing.assert_close(process.loss(wrong, x_0, x_t, s, t), loss)
    for eta in (0.0, 1.0):
        laws = [process.transition(p, x_t, t, 0.5 * t, eta) for p in (target + error, wrong)]
        torch.testing.assert_close(laws[0].mean, laws[1].mean)
        torch.testing.assert_close(
            process.denoised(wrong, x_t, t), laws_mean(process, x_t, t, wrong)
        )


def laws_mean(process: GaussianProcess, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """The mean of the step that goes to the data at once, which is the estimate of x_0."""
    return process.transition(prediction, x_t, t, torch.zeros_like(t), 0.0).loc


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v", "velocity"])
def test_estimates_of_data_lie_in_the_subspace(kind: PredictionType) -> None:
    """What a network says of empty slots and of the centre counts for nothing."""
    process = GaussianProcess(PolynomialVP(), kind, SPACE)
    x_0, eps, t = cloud(1), cloud(2), torch.full((4,), 0.6, dtype=torch.float64)
    alpha, sigma = (level.view(4, 1, 1) for level in process.schedule.levels(t))
    x_t, prediction = alpha * x_0 + sigma * eps, process.prediction(x_0, eps, t)
    outside = 7.0 * (~full()).unsqueeze(-1) + 2 * (torch.arange(CHANNELS) < 3)
    for given in (prediction, prediction + outside):
        torch.testing.assert_close(process.denoised(given, x_t, t), x_0)


def test_processes_without_a_subspace_are_as_they_were() -> None:
    plain = GaussianProcess(RectifiedFlow(), "velocity")
    prior = plain.prior(torch.zeros(2, 3))
    assert type(prior) is Gaussian and prior.num_dimensions.tolist() == [3, 3]
    torch.testing.assert_close(
        Gaussian(torch.zeros(2, 3), torch.tensor([[0.5], [2.0]])).entropy(),
        torch.distributions.Normal(0, torch.tensor([0.5, 2.0])).entropy() * 3,
    )
    with pytest.raises(UsageError, match="num_coordinates"):
        PointClouds(-1)


def test_padded_classes_are_those_of_the_shorter_state() -> None:
    plain, padded = MaskedProcess(3), MaskedProcess(3, padded=True)
    torch.manual_seed(0)
    x_0 = torch.randint(0, 3, (4, 5))
    wide = torch.nn.functional.pad(x_0, (0, 2), value=padded.empty)
    s, t = torch.zeros(4), torch.full((4,), 0.7)
    x_t = padded.noised(wide, s, t)
    assert (x_t[:, 5:] == padded.empty).all() and (x_t[:, :5] == padded.mask).any()
    assert ((x_t[:, :5] == wide[:, :5]) | (x_t[:, :5] == padded.mask)).all()
    logits = torch.randn(4, 7, 3)
    short = x_t[:, :5]
    torch.testing.assert_close(
        padded.loss(logits, wide, x_t, s, t), plain.loss(logits[:, :5], x_0, short, s, t)
    )
    laws = [
        process.transition(given, x, t, 0.5 * t, 1.0)
        for process, given, x in ((padded, logits, x_t), (plain, logits[:, :5], short))
    ]
    draw = laws[0].sample()
    assert (draw[:, 5:] == padded.empty).all()
    for reduction in ("sum", "mean"):
        torch.testing.assert_close(
            laws[0].log_prob(draw, reduction), laws[1].log_prob(draw[:, :5], reduction)
        )
    start = padded.prior(wide)
    assert torch.equal(start.sample(), wide.where(wide == padded.empty, padded.mask))
    assert not start.log_prob(start.sample()).any()
    assert torch.equal(padded.denoised(logits, x_t, t)[:, 5:], wide[:, 5:])


def test_fields_may_have_names_that_modules_use_themselves() -> None:
    process = ProductProcess({"type": MaskedProcess(3), "half": PROCESSES["flow"]})
    assert process.names == ["half", "type"] and process.field("type") is not None


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_classes_may_be_decided_late(power: float) -> None:
    """Shares of masks against (1 - t)^power, one reverse step by Bayes' rule, the loss's weight."""
    process = MaskedProcess(3, power=power)
    shown = torch.tensor([(1 - u) ** power for u in (0.4, 0.7)])
    x_0, num = torch.zeros(1, 40_000, dtype=torch.int64), 40_000
    zero, s, t = torch.zeros(1), torch.tensor([0.4]), torch.tensor([0.7])
    torch.manual_seed(0)
    x_s = process.noised(x_0, zero, s)
    for x, share in ((x_s, shown[0]), (process.noised(x_s, s, t), shown[1])):
        error = 4 * (share * (1 - share) / num) ** 0.5
        assert abs((x == 0).float().mean() - share) < error
    hidden = torch.tensor([[process.mask]])
    law = process.transition(torch.randn(1, 1, 3), hidden, t, s, 1.0)
    # Still hidden at s, given that it is at t.
    torch.testing.assert_close(law.log_prob(hidden)[0].exp(), (1 - shown[0]) / (1 - shown[1]))
    logits = torch.randn(1, 1, 3)
    loss = process.loss(logits, torch.tensor([[1]]), hidden, zero, t)
    step = 1e-4
    slope = ((1 - 0.7 - step) ** power - (1 - 0.7 + step) ** power) / (2 * step)
    weight = -slope / (1 - (1 - 0.7) ** power)
    wanted = -weight * logits.log_softmax(dim=-1)[0, 0, 1]
    torch.testing.assert_close(loss[0], wanted, rtol=1e-4, atol=0)
    with pytest.raises(UsageError, match="power"):
        MaskedProcess(3, power=0.0)
