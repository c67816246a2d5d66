"""Scales of inputs and outputs against the joint normal law of data, noise and x_t."""

import pytest
import torch
from torch import Tensor

from domains.molecule.networks.preconditioning import Preconditioning
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import CosineVP, PolynomialVP, RectifiedFlow

PROCESSES = {
    "velocity": GaussianProcess(RectifiedFlow(), "velocity"),
    "v": GaussianProcess(CosineVP(), "v"),
    "epsilon": GaussianProcess(PolynomialVP(), "epsilon"),
    "sample": GaussianProcess(CosineVP(), "sample"),
}


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("t", [0.01, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_outputs_are_the_guess_of_a_normal_law_and_its_error(
    kind: str, t: float, rho: float
) -> None:
    process, std, time = PROCESSES[kind], 1.7, torch.tensor([t], dtype=torch.float64)
    alpha, sigma = (float(level) for level in process.schedule.levels(time))
    # Covariance of (x_0, eps, x_t): conditioned on x_t by the formula for normal laws.
    mix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [alpha, sigma]], dtype=torch.float64)
    pair = torch.tensor([[std**2, rho * std], [rho * std, 1.0]], dtype=torch.float64)
    joint = mix @ pair @ mix.T
    x_t = torch.tensor([[0.8]], dtype=torch.float64)
    means = joint[:2, 2] / joint[2, 2] * float(x_t)
    rest = joint[:2, :2] - joint[:2, 2:] @ joint[2:, :2] / joint[2, 2]

    def of(x_0: float | Tensor, eps: float | Tensor) -> Tensor:
        values = (torch.as_tensor(v, dtype=torch.float64).reshape(1, 1) for v in (x_0, eps))
        return process.prediction(*values, time)

    scales = Preconditioning(process, time)
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    guess = scales.output(x_t, zero, std, rho)
    torch.testing.assert_close(guess, of(means[0], means[1]))
    weights = torch.cat([of(1.0, 0.0), of(0.0, 1.0)])[:, 0]
    error = (weights @ rest @ weights).clamp(min=0).sqrt()
    found = (scales.output(x_t, one, std, rho) - guess)[0, 0]
    torch.testing.assert_close(found, error, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scales.input(x_t, std, rho), x_t / joint[2, 2].sqrt())
