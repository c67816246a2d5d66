"""The laws that benchmarks/contrast_mixture.py measures against."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("contrast_mixture")


@pytest.fixture
def contrast(mixture: ModuleType) -> ModuleType:
    return importlib.import_module("contrast")


def test_posterior_means_are_those_of_a_sum_over_a_grid(mixture: ModuleType) -> None:
    limits = mixture.limits()
    line = torch.linspace(-3, 3, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    rewards = limits.mixture.sample(10**6, torch.Generator().manual_seed(1))[:, 0].sort().values
    share = (torch.searchsorted(rewards, grid[:, 0].contiguous()) / len(rewards)) ** 3
    x_t = torch.tensor([[0.3, -0.4], [1.0, 0.5], [-0.9, 1.2]], dtype=torch.float64)
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    alpha, sigma = (level.unsqueeze(1) for level in limits.schedule.levels(t))
    apart = torch.cdist(x_t / alpha, grid) * alpha / sigma
    mass = (limits.mixture.log_prob(grid) - 0.5 * apart.square()).softmax(dim=1)
    torch.testing.assert_close(limits.reference(x_t, t), mass @ grid, rtol=0, atol=1e-6)
    own = mass * share
    expected = own @ grid / own.sum(dim=1, keepdim=True)
    torch.testing.assert_close(limits.law(x_t, t), expected, rtol=0, atol=3e-3)


def test_the_accepted_are_drawn_from_the_density_of_best_of_four(mixture: ModuleType) -> None:
    limits = mixture.limits()
    line = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    whole = mixture.distribution(limits.mixture, line)
    middle = (whole[1:] + whole[:-1]) / 2
    mean = float(((line[1:] + line[:-1]) / 2 * 4 * middle**3 * whole.diff()).sum())
    drawn = limits.accepted[:, 0]
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / 256)


class Switched(nn.Module):
    """The exact denoiser, and as much of the way to a loss's limit as `switch` says."""

    def __init__(self, mixture: ModuleType, pipeline: GaussianMixturePipeline, loss: str) -> None:
        super().__init__()
        self.exact, self.limit = pipeline.denoiser.requires_grad_(False), mixture.Limit(loss)
        self.switch = nn.Parameter(torch.zeros(()))

    @property
    def means(self) -> Tensor:
        return self.exact.means

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        start = self.exact(x_t, t)
        with torch.no_grad():
            end = self.limit.predict(x_t, t, None)
        return start + self.switch * (end - start)


@pytest.mark.parametrize(
    "loss", ["published", "control variate", "contrast 2", "contrast 4", "DiffusionNFT"]
)
def test_losses_are_stationary_at_their_limits(
    mixture: ModuleType, contrast: ModuleType, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Their own gradients vanish there and not before, on candidates of the mixture itself."""
    pipeline = GaussianMixturePipeline()
    pipeline.denoiser = Switched(mixture, pipeline, loss)  # type: ignore[assignment]
    tuner, groups, batches = mixture.base(0, pipeline), 128, 24
    points = mixture.limits().mixture.sample(groups * batches * 4, torch.Generator().manual_seed(2))
    monkeypatch.setattr(tuner.rollouts, "draw", lambda *_, **__: [points.float()])
    store = contrast.Store(tuner, groups * batches)
    switch, found = tuner.pipeline.denoiser.switch, {}
    for share in (1.0, 0.5):
        switch.data.fill_(share)
        gradients = []
        for k in range(batches):
            rows = torch.arange(k * groups, (k + 1) * groups)
            part = contrast.parts_of(rows, 0, k, alike=loss in contrast.ALIKE)
            (own,) = torch.autograd.grad(contrast.LOSSES[loss](tuner, store, part), switch)
            gradients.append(own / groups)
        drawn = torch.stack(gradients)
        found[share] = float(drawn.mean() / (drawn.std() / batches**0.5))
    assert abs(found[1.0]) < 4 and found[0.5] < -8  # standard errors
