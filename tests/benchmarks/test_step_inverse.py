"""The iteration that undoes a step, beside its Lipschitz constant in closed form."""

import pytest
import torch
from torch import Tensor

from benchmarks.step_inverse import contraction, deviations, returned
from benchmarks.step_jacobian import Walk
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import tensor_of

T, BATCH = 4, 3
VARIANCES = torch.tensor([2.0, 0.5, 1e-6], dtype=torch.float64)


@pytest.fixture(scope="module")
def flow() -> Walk:
    """The exact rectified flow of data N(0, diag(VARIANCES))."""
    process = GaussianProcess(RectifiedFlow(), "velocity")

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (1 - t)[:, None], t[:, None]
        return (sigma - alpha * VARIANCES) / (alpha**2 * VARIANCES + sigma**2) * x_t

    condition = Condition([{}], {}, torch.zeros(BATCH, dtype=torch.int64))
    x_1 = torch.randn(BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Walk(denoiser, process, x_1, condition, T)


def test_contraction_of_gaussian_data(flow: Walk) -> None:
    """Euler's step of length h from t has slopes 1 - h v', and its iteration |h v'|."""
    for i in range(T):
        t, h = 1 - i / T, 1 / T
        slopes = (t - (1 - t) * VARIANCES) / ((1 - t) ** 2 * VARIANCES + t**2)
        found = contraction(flow, i, 3, torch.Generator().manual_seed(i))
        assert found == pytest.approx(float((h * slopes).abs().max())), i
    # The last step takes a direction without variance to zero: nothing contracts there.
    assert found == pytest.approx(1, abs=1e-4)


def test_noise_returns_where_steps_contract() -> None:
    pipeline = GaussianMixturePipeline(
        [1.0], [[0.3, -0.2]], [0.8], schedule="rectified_flow", prediction_type="velocity"
    )
    condition = pipeline.example().repeat(BATCH)
    x_1 = torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(0))
    walked = Walk(pipeline, pipeline.process, x_1, condition, T)
    noise = torch.Generator().manual_seed(0)
    assert max(contraction(walked, i, 2, noise) for i in range(T)) < 0.6
    found = returned(pipeline, walked.states[-1], condition, T, FixedPoint(1e-6, 100))
    torch.testing.assert_close(found["x_1"], tensor_of(x_1), rtol=0, atol=1e-4)
    assert found["unconverged"] == 0
    assert found["picture_error"] < 1e-5


def test_deviations_of_flat_pictures() -> None:
    """Pictures of one grey each vary in the constant direction alone, by size times theirs."""
    greys = torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    found = deviations(greys.expand(-1, 1, 8, 8))
    assert float(found[0]) == pytest.approx(8 * float(greys.std()), rel=1e-5)
    assert float(found[1:].max()) < 1e-6
