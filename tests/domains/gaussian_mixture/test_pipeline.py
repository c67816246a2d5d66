import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, distributions

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.pipeline import GaussianMixtureDenoiser, GaussianMixturePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, Schedule, vp_betas
from lit_rlft.loop.reference import LoRA, attach_lora
from tests.support import assert_close_in_rounding

SCHEDULES: dict[str, Schedule] = {
    "discrete": DiscreteVP(vp_betas()),
    "cosine": CosineVP(),
    "flow": RectifiedFlow(),
}
BATCH = {"index": torch.arange(3), "name": ["mixture"] * 3}


def exact_law(mixture: Mixture, alpha: float, sigma: float) -> distributions.Distribution:
    """The law of x_t in torch.distributions."""
    scale = (alpha**2 * mixture.stds**2 + sigma**2).sqrt()
    return distributions.MixtureSameFamily(
        distributions.Categorical(mixture.weights),
        distributions.Independent(
            distributions.Normal(
                alpha * mixture.means, scale.unsqueeze(1).expand_as(mixture.means)
            ),
            1,
        ),
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("level", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_denoiser_is_the_score_of_the_noised_mixture(name: str, level: float) -> None:
    # Tweedie: E[eps | x_t] = -sigma grad log p_t, E[x_0 | x_t] = (x_t - sigma E[eps]) / alpha.
    schedule = SCHEDULES[name]
    denoiser = GaussianMixtureDenoiser(
        Mixture.of(WEIGHTS, MEANS, STDS), GaussianProcess(schedule, "v")
    ).double()
    x_t = 2 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.full((50,), level, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t)[0].item(), schedule.sigma(t)[0].item()
    x_0, eps = denoiser.posterior_means(x_t, t)
    at = x_t.clone().requires_grad_()
    law = exact_law(denoiser.mixture, alpha, sigma)
    (score,) = torch.autograd.grad(law.log_prob(at).sum(), at)
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x_t, rtol=1e-9, atol=1e-9)
    if alpha > 1e-6:
        torch.testing.assert_close(x_0, (x_t + sigma**2 * score) / alpha, rtol=1e-6, atol=1e-6)


def test_posterior_mean_by_quadrature() -> None:
    weights, means, stds = [0.3, 0.7], [[-1.0], [0.8]], [0.2, 0.5]
    mixture = Mixture.of(weights, means, stds)
    denoiser = GaussianMixtureDenoiser(mixture, GaussianProcess(RectifiedFlow(), "v")).double()
    grid = np.linspace(-6, 6, 4001)
    prior = sum(
        w * stats.norm.pdf(grid, m[0], s) for w, m, s in zip(weights, means, stds, strict=True)
    )
    for level, x in itertools.product((0.1, 0.5, 0.95), (-1.2, 0.3, 2.0)):
        posterior = prior * stats.norm.pdf(x, (1 - level) * grid, level)
        exact = (posterior * grid).sum() / posterior.sum()
        x_t = torch.tensor([[x]], dtype=torch.float64)
        x_0, eps = denoiser.posterior_means(x_t, torch.tensor([level]).double())
        assert x_0.item() == pytest.approx(exact, abs=1e-6)
        assert eps.item() == pytest.approx((x - (1 - level) * exact) / level, abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_denoiser_is_defined_at_both_ends(name: str) -> None:
    mixture = Mixture.of(WEIGHTS, MEANS, STDS)
    denoiser = GaussianMixtureDenoiser(mixture, GaussianProcess(SCHEDULES[name], "velocity"))
    x_t = torch.randn(4, 2)
    x_0, eps = denoiser.posterior_means(x_t, torch.zeros(4))
    torch.testing.assert_close(x_0, x_t)
    assert not eps.any()
    if name != "discrete":
        x_0, eps = denoiser.posterior_means(x_t, torch.ones(4))
        overall = (mixture.weights.unsqueeze(1) * mixture.means).sum(dim=0).float()
        torch.testing.assert_close(x_0, overall.expand(4, 2))
        torch.testing.assert_close(eps, x_t)


def test_far_points_do_not_overflow() -> None:
    pipeline = GaussianMixturePipeline()
    x_t = torch.tensor([[1e4, -1e4]])
    prediction = pipeline.predict(x_t, torch.full((1,), 0.001), pipeline.encode(BATCH))
    assert prediction.isfinite().all()


def test_mixture_agrees_with_torch() -> None:
    mixture = Mixture.of(WEIGHTS, MEANS, STDS)
    exact = exact_law(mixture, 1.0, 0.0)
    points = torch.randn(7, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(points), exact.log_prob(points))
    num = 20_000
    drawn = mixture.sample(num, torch.Generator().manual_seed(0))
    counts = torch.bincount(mixture.nearest(drawn), minlength=5).numpy()
    # Modes are more than 3 stds from each other's border: 1e-3 of the points change sides.
    assert stats.chisquare(counts, num * mixture.weights.numpy()).pvalue > 1e-3
    error = exact.variance.sqrt() / math.sqrt(num)
    assert ((drawn.mean(dim=0) - exact.mean).abs() < 4 * error).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": [1.0]},
        {"weights": [], "means": [], "stds": []},
        {"weights": [1.0, -1.0], "means": [[0.0], [1.0]], "stds": [1.0, 1.0]},
        {"weights": [1.0, 1.0], "means": [[0.0], [1.0]], "stds": [1.0, 0.0]},
        {"weights": [1.0, 1.0], "means": [[0.0], [1.0, 2.0]], "stds": [1.0, 1.0]},
        {"weights": [1.0], "means": [[]], "stds": [1.0]},
        {"schedule": "sigmoid"},
        {"prediction_type": "score"},
        {"residual_width": -1},
        {"schedule": "rectified_flow", "prediction_type": "epsilon"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        GaussianMixturePipeline(**settings)


def test_conditions_and_states() -> None:
    pipeline = GaussianMixturePipeline()
    condition = pipeline.encode(BATCH).repeat(2)
    assert len(condition) == 6 and condition.each() == [{"name": "mixture"}] * 6
    blank = pipeline.blank(condition)
    assert blank.shape == (6, 2) and blank.dtype == torch.float32
    assert pipeline.double().blank(condition).dtype == torch.float64
    points = torch.randn(3, 2)
    assert torch.equal(pipeline.states({**BATCH, "x_0": points}), points.double())
    assert pipeline.decode(points, condition) is points
    assert pipeline.name == "gaussian_mixture" and pipeline.device.type == "cpu"


def test_keys_are_the_nearest_modes() -> None:
    pipeline = GaussianMixturePipeline()
    points = torch.tensor(MEANS).flip(0) + 0.1
    assert pipeline.keys(points, pipeline.encode(BATCH)) == [4, 3, 2, 1, 0]


def test_residual_starts_at_zero_and_two_pipelines_are_the_same_model() -> None:
    first, second = GaussianMixturePipeline(), GaussianMixturePipeline()
    for ours, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, other)
    x_t, t, condition = torch.randn(3, 2), torch.rand(3), first.encode(BATCH)
    alone = GaussianMixturePipeline(residual_width=0)
    assert_close_in_rounding(first(x_t, t, condition), alone(x_t, t, condition))
    first.denoiser.residual.fc3.bias.data.add_(1)
    torch.testing.assert_close(first(x_t, t, condition), alone(x_t, t, condition) + 1)


def test_lora_adapts_the_residual(tmp_path: Path) -> None:
    pipeline = GaussianMixturePipeline()
    x_t, t, condition = torch.randn(3, 2), torch.rand(3), pipeline.encode(BATCH)
    before = pipeline(x_t, t, condition)
    attach_lora(pipeline, LoRA(rank=4))
    trained = [name for name, p in pipeline.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    assert torch.equal(pipeline(x_t, t, condition), before)
    assert json.loads(pipeline.save(tmp_path)[0].read_text())["exact"] is True
    optimizer = torch.optim.SGD([p for p in pipeline.parameters() if p.requires_grad], 0.1)
    pipeline(x_t, t, condition).sum().backward()
    optimizer.step()
    assert not torch.allclose(pipeline(x_t, t, condition), before)
    assert json.loads(pipeline.save(tmp_path)[0].read_text())["exact"] is False
    with pytest.raises(UsageError, match="fc1"):
        attach_lora(GaussianMixturePipeline(residual_width=0), LoRA())


def test_the_learned_mixture_can_be_read_off(tmp_path: Path) -> None:
    pipeline = GaussianMixturePipeline(residual_width=0)
    pipeline.denoiser.logits.data[0] += math.log(2)
    pipeline.denoiser.means.data[1] += 1
    (path,) = pipeline.save(tmp_path / "tuned")
    values = json.loads(path.read_text())
    assert values.pop("exact") is True
    # Weight 0.3 doubled and normalised; the settings make the same pipeline again.
    assert values["weights"] == pytest.approx([0.6 / 1.3, *(w / 1.3 for w in WEIGHTS[1:])])
    assert values["means"][1] == pytest.approx([-0.33, 1.43])
    again = GaussianMixturePipeline(**values, residual_width=0)
    x_t, t, condition = torch.randn(3, 2), torch.rand(3), again.encode(BATCH)
    torch.testing.assert_close(again(x_t, t, condition), pipeline(x_t, t, condition))


def test_full_fine_tuning_fits_another_mixture() -> None:
    """Maximum likelihood through the native loss moves a wrong mean to the data's."""
    torch.manual_seed(0)
    pipeline = GaussianMixturePipeline(
        [1.0, 1.0], [[-1.0], [1.0]], [0.3, 0.3], prediction_type="v", residual_width=0
    )
    data = Mixture.of([1.0, 3.0], [[-1.0], [0.7]], [0.3, 0.3])
    process = pipeline.process
    optimizer = torch.optim.Adam(pipeline.denoiser.parameters(), 0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 250)
    for _ in range(250):
        x_0 = data.sample(512).float()
        t = process.draw_times(torch.rand(512))
        x_t = process.noised(x_0, torch.zeros_like(t), t)
        prediction = pipeline.denoiser(x_t, t)
        optimizer.zero_grad()
        process.loss(prediction, x_0, x_t, torch.zeros_like(t), t).mean().backward()
        optimizer.step()
        decay.step()
    learned = pipeline.denoiser.mixture
    torch.testing.assert_close(learned.weights, data.weights.float(), rtol=0, atol=0.05)
    torch.testing.assert_close(learned.means, data.means.float(), rtol=0, atol=0.05)
    torch.testing.assert_close(learned.stds, data.stds.float(), rtol=0, atol=0.05)


def red(pictures: Tensor) -> Tensor:
    """Centre of the red dot of each picture, (row, column)."""
    ink = (pictures[:, 0] - pictures[:, 1]).clamp(min=0)
    ink = ink / ink.sum(dim=(1, 2), keepdim=True)
    axis = torch.arange(64.0)
    return torch.stack([(ink.sum(2) * axis).sum(1), (ink.sum(1) * axis).sum(1)], dim=1)


def test_pictures_show_where_a_point_is() -> None:
    pipeline = GaussianMixturePipeline()
    condition = pipeline.encode(BATCH)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pictures = pipeline.render(points, condition)
    assert pictures.shape == (3, 3, 64, 64)
    assert pictures.min() >= 0 and pictures.max() <= 1
    middle, right, up = red(pictures)
    torch.testing.assert_close(middle, torch.tensor([31.5, 31.5]), atol=0.1, rtol=0)
    assert right[1] > middle[1] + 5 and abs(right[0] - middle[0]) < 0.1
    assert up[0] < middle[0] - 5 and abs(up[1] - middle[1]) < 0.1
    outside = pipeline.render(torch.tensor([[1e3, torch.inf]]), condition)
    assert (red(outside)[0] - torch.tensor([0.0, 63.0])).abs().max() < 2


@pytest.mark.parametrize("dims", [1, 3])
def test_pictures_of_other_dimensions(dims: int) -> None:
    pipeline = GaussianMixturePipeline([1.0], [[0.5] * dims], [1.0])
    assert pipeline.render(torch.zeros(2, dims), pipeline.encode(BATCH)).shape == (2, 3, 64, 64)


def test_samples_are_written_as_coordinates(tmp_path: Path) -> None:
    pipeline = GaussianMixturePipeline()
    points = torch.tensor([[0.5, 1.0], [-2.0, 0.25]])
    paths = pipeline.save_samples(points, pipeline.encode(BATCH), tmp_path, ["a", "b"])
    assert [path.name for path in paths] == ["a.json", "b.json"]
    assert [json.loads(path.read_text()) for path in paths] == points.tolist()
