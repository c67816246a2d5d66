"""Golden numbers: log-probabilities, losses and gradients of TRL's DDPOTrainer.

They were computed once with trl 0.23.1, diffusers 0.35.2 and torch 2.13.0 (CPU, float32) by calling
its `scheduler_step` and `DDPOTrainer.calculate_loss` on the inputs below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.loop.experience import Experience

STEPS = 10
SCHEDULE = DiscreteVP(vp_betas(), steps_offset=1, ends_at_zero=False)

# Per prediction type and eta: for the first, the sixth and the last of ten steps, four samples.
LOG_PROBS: dict[tuple[PredictionType, float], list[list[float]]] = {
    ("epsilon", 1.0): [
        [-1.3754317, -1.4396662, -1.4102368, -1.3128583],
        [-0.63623077, -0.66727984, -0.65980911, -0.58439273],
        [-75.440292, -73.505653, -71.995827, -74.007568],
    ],
    ("epsilon", 0.3): [
        [-4.7655945, -5.2102313, -4.9396524, -4.3282533],
        [-3.1258194, -3.3022149, -3.2000465, -2.7707965],
        [-866.29797, -842.91852, -825.40228, -853.56946],
    ],
    ("sample", 1.0): [
        [-0.72316813, -0.72758198, -0.72406346, -0.72523862],
        [-0.44389957, -0.47346386, -0.44156578, -0.45387596],
        [-243.41791, -269.36511, -245.37639, -245.9516],
    ],
    ("sample", 0.3): [
        [-0.042150285, -0.017223272, 0.00018982755, -0.058355886],
        [-0.9365958, -0.93686771, -0.80703938, -1.0679135],
        [-1274.1249, -1355.6772, -1240.4961, -1334.6353],
    ],
    ("v", 1.0): [
        [-0.72134519, -0.72033346, -0.72522843, -0.7209602],
        [-0.32869607, -0.32714164, -0.34449345, -0.3101134],
        [-75.231827, -73.304832, -71.80217, -73.805466],
    ],
    ("v", 0.3): [
        [-0.043422163, -0.037965372, -0.034091845, -0.018094212],
        [-1.0023429, -1.0248206, -1.0492078, -0.83699125],
        [-864.8642, -841.54358, -824.07141, -852.17676],
    ],
}

# Four pairs and their mean: loss, its derivative by the weight, approx_kl, clip_fraction.
ADVANTAGES = [1.3, -0.7, 2.1, -1.9]
OLD = [-0.6206668615341187, -0.2897348701953888, 0.3613744378089905, -1.5224194526672363]
LOSSES: dict[int, list[list[float]]] = {
    1: [
        [-1.30013001, 0.0, 4.5000629e-6, 1.0],
        [0.700035036, -0.0419775024, 1.2504149e-9, 0.0],
        [-2.099915981, 0.6298568249, 7.997887e-10, 0.0],
        [1.899809957, 0.0, 1.9999486e-6, 1.0],
        [-0.2000502646, 0.1469698399, 1.6255156e-6, 0.5],
    ],
    -1: [
        [1.303905845, -0.0083618462, 4.5000629e-6, 1.0],
        [-0.700035036, 0.0419775024, 1.2504149e-9, 0.0],
        [2.099915981, -0.6298568249, 7.997887e-10, 0.0],
        [-1.896203876, 28.1297187806, 1.9999486e-6, 1.0],
        [0.2018957436, 6.8833689690, 1.6255156e-6, 0.5],
    ],
}


def wave(*shape: int, rate: float, shift: float = 0.0) -> Tensor:
    """Numbers in [-1, 1] that no generator of random numbers has to reproduce."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * rate + shift).sin().float().view(*shape)


X_T = wave(4, 4, 3, 3, rate=0.7)


def ends(places: list[int]) -> tuple[Tensor, Tensor]:
    times = SCHEDULE.times(STEPS)
    return times[places], times[[place + 1 for place in places]]


@pytest.mark.parametrize(("kind", "eta"), LOG_PROBS)
def test_log_probabilities_are_trls(kind: PredictionType, eta: float) -> None:
    """Theirs take the last std from a difference in single precision: its logarithm is 7e-6 off."""
    process = GaussianProcess(SCHEDULE, kind)
    prediction = wave(4, 4, 3, 3, rate=1.1, shift=0.3)
    x_s = 0.8 * X_T + 0.3 * wave(4, 4, 3, 3, rate=1.7, shift=0.9)
    for place, expected in zip((0, 5, 9), LOG_PROBS[kind, eta], strict=True):
        t, s = ends([place] * 4)
        law = process.transition(prediction, X_T, t, s, eta)
        assert isinstance(law, Gaussian)
        found = law.log_prob(x_s, "mean").tolist()
        rel = 2e-5 if place == 9 else 1e-6
        assert found == pytest.approx(expected, rel=rel, abs=2e-6)


class ClosedForm(nn.Module):
    """weight * x plus what depends on the embedding and on the timestep."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.6))

    def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor, **_: Any) -> tuple[Tensor]:
        shift = 0.1 * embedding.mean(dim=(1, 2)) + 0.2 * timestep / 1000
        return (self.weight * x + shift.view(-1, 1, 1, 1),)


def guided(folder: Path, sign: int) -> tuple[DDPO, Experience]:
    """A guided pipeline around the closed form, and four pairs of four steps."""
    pipeline: Any = TextToImagePipeline(str(folder), guidance_scale=5.0)
    pipeline.denoiser = ClosedForm()
    embedding = torch.cat([wave(4, 5, 6, rate=0.37), wave(1, 5, 6, rate=0.53, shift=0.2)])
    condition = Condition([{}] * 4, {"embedding": embedding}, torch.arange(4), null=4)
    t, s = ends([1, 4, 7, 8])
    pairs = {
        "x_t": X_T,
        "x_s": X_T + 0.05 * wave(4, 4, 3, 3, rate=1.7, shift=0.9),
        "t": t,
        "coefficients": pipeline.process.coefficients(t, s, 1.0),
        "log_prob": torch.tensor(OLD),
        "advantage": sign * torch.tensor(ADVANTAGES),
        "weight": torch.ones(4),
    }
    tuner = DDPO(pipeline, Symmetry(), sampler=Sampler(STEPS, 1.0))
    return tuner, Experience(pairs, condition, range(4))


@pytest.mark.parametrize("sign", LOSSES)
def test_losses_and_gradients_are_trls(
    tiny_stable_diffusion: Callable[..., Path], sign: int
) -> None:
    """Under guidance, for ratios on both sides of the clip range and advantages of both signs."""
    tuner, pairs = guided(tiny_stable_diffusion(), sign)
    losses, values = tuner.loss(pairs, None)
    (weight,) = tuner.trainable().parameters()
    expected = torch.tensor(LOSSES[sign])
    gradients = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in [*losses, losses.mean()]
    ]
    columns = [losses, values["approx_kl"], values["clip_fraction"]]
    found = torch.stack([torch.cat([column, column.mean().view(1)]) for column in columns], dim=1)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.stack(gradients), expected[:, 1], rtol=2e-6, atol=1e-6)
    # Half a square of a difference of 4e-5 between numbers of size 1.
    torch.testing.assert_close(found[:, 1], expected[:, 2], rtol=0.1, atol=1e-10)
    torch.testing.assert_close(found[:, 2], expected[:, 3], rtol=0, atol=0)
