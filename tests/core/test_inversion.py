"""Inversion of the sampler: known pairs (z, T z), orders of convergence, other solvers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import fsolve
from torch import Tensor

import domains.text_to_image.pipeline
from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.pipeline import GaussianMixtureDenoiser, GaussianMixturePipeline
from domains.image.pipeline import ImagePipeline
from domains.layout.pipeline import LayoutPipeline
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess, MaskedProcess, ProductProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, vp_betas
from lit_rlft.core.state import State, flatten, tensor_of
from lit_rlft.core.subspace import PointClouds

FLOW = GaussianProcess(RectifiedFlow(), "velocity")
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def conditions(num: int) -> Condition:
    return Condition([{}], {}, torch.zeros(num, dtype=torch.int64))


def mixture(scale: float = 2.0, process: GaussianProcess = FLOW) -> Denoiser:
    law = Mixture.of(WEIGHTS, MEANS, [scale * std for std in STDS])
    network = GaussianMixtureDenoiser(law, process, residual_width=0).double().requires_grad_(False)
    return lambda x, t, condition: network(x, t)


def noise(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 2, dtype=torch.float64, generator=generator)


def lipschitz(denoiser: Denoiser, x: Tensor, num_steps: int) -> float:
    """Largest norm of the velocity's derivative on the way, by differences, over num_steps."""
    largest, h = 0.0, 1e-5
    for t in FLOW.times(num_steps)[:-1]:
        at = t.expand(len(x))
        columns = [
            denoiser(x + h * e, at, conditions(1)) - denoiser(x - h * e, at, conditions(1))
            for e in torch.eye(2).double()
        ]
        norms = torch.linalg.matrix_norm(torch.stack(columns, dim=-1) / (2 * h), 2)
        largest = max(largest, float(norms.max()))
        x = x - denoiser(x, at, conditions(1)) / num_steps
    return largest / num_steps


def test_a_linear_velocity_is_inverted_to_the_order_of_the_iterations() -> None:
    r"""For v = -q x from :math:`u_0 = y`, :math:`u_n = y (1 - (-q)^{n+1}) / (1 + q)`."""
    y, q = torch.tensor([[1.0], [-0.5]], dtype=torch.float64), 0.3
    for n in (1, 2, 5, 10):
        inverted = Sampler(1).invert(
            lambda x, t, c: -q * x, FLOW, y, conditions(2), FixedPoint(0.0, n, memory=0)
        )
        torch.testing.assert_close(
            inverted.x_1, y * (1 - (-q) ** (n + 1)) / (1 + q), rtol=0, atol=1e-15
        )
        assert inverted.residuals[0] == pytest.approx(q**n, rel=1e-6)
        assert inverted.iterations.tolist() == [n, n]


def test_errors_on_a_mixture_are_those_of_the_published_toy() -> None:
    """At eta L = 0.3: 8.8e-2, 4.2e-3, 9.0e-7 and 8.6e-13 with 1, 2, 5 and 10 iterations."""
    z, sampler = noise(200), Sampler(20)
    denoiser = mixture()
    assert lipschitz(denoiser, z, 20) == pytest.approx(0.3, abs=0.01)
    x_0 = sampler.sample(denoiser, FLOW, z, conditions(200))
    errors = {}
    for n in (1, 2, 5, 10):
        solver = FixedPoint(0.0, n, memory=0)
        inverted = sampler.invert(denoiser, FLOW, x_0, conditions(200), solver)
        errors[n] = (tensor_of(inverted.x_1) - z).abs().amax(dim=1)
    assert float(errors[1].max()) == pytest.approx(8.8e-2, rel=0.2)
    assert float(errors[2].max()) == pytest.approx(4.2e-3, rel=0.2)
    # Later on the slopes decide, which differ from sample to sample.
    assert float(errors[5].median()) < 9.0e-7 < float(errors[5].max())
    assert float(errors[10].median()) < 8.6e-13 < float(errors[10].max())
    assert float(errors[10].max()) < 20 * 0.3**10


@pytest.mark.parametrize("memory", [0, 5])
def test_each_step_is_the_one_that_another_solver_finds(memory: int) -> None:
    denoiser, num_steps = mixture(), 6
    sampler, x_0 = Sampler(num_steps), mixture_points(6)
    x = x_0.numpy()
    for j in range(num_steps):
        t = torch.tensor([(j + 1) / num_steps], dtype=torch.float64)

        def equation(u: np.ndarray, y: np.ndarray, t: Tensor = t) -> np.ndarray:
            point = torch.from_numpy(u).unsqueeze(0)
            v = denoiser(point, t, conditions(1))[0].numpy()
            return u - v / num_steps - y

        x = np.stack([fsolve(equation, row, args=(row,), xtol=1e-10) for row in x])
    solver = FixedPoint(1e-11, 500, memory)
    inverted = sampler.invert(denoiser, FLOW, x_0, conditions(6), solver)
    np.testing.assert_allclose(tensor_of(inverted.x_1).numpy(), x, atol=1e-8)
    assert (inverted.residuals <= 1e-11).all()


def mixture_points(num: int) -> Tensor:
    law = Mixture.of(WEIGHTS, MEANS, [2 * std for std in STDS])
    return law.sample(num, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_steps", [4, 8, 20])
def test_the_wrong_time_does_not_pass_for_an_inverse(num_steps: int) -> None:
    """A step from t to s called the denoiser at t; calling it at s misses z by far."""
    denoiser, z = mixture(), noise(50)
    x_0 = Sampler(num_steps).sample(denoiser, FLOW, z, conditions(50))

    def late(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return denoiser(x, t - 1 / num_steps, condition)

    right, wrong = (
        Sampler(num_steps).invert(either, FLOW, x_0, conditions(50)).x_1
        for either in (denoiser, late)
    )
    assert float((tensor_of(right) - z).abs().max()) < 1e-4
    assert float((tensor_of(wrong) - z).abs().max()) > 3e-2


@pytest.mark.parametrize(
    "process",
    [
        FLOW,
        GaussianProcess(RectifiedFlow(3.0), "velocity"),
        GaussianProcess(RectifiedFlow(), "sample"),
        GaussianProcess(DiscreteVP(vp_betas()), "epsilon"),
        GaussianProcess(DiscreteVP(vp_betas(), ends_at_zero=False, spacing="trailing"), "v"),
        GaussianProcess(CosineVP(), "v"),
        GaussianProcess(CosineVP(), "sample"),
    ],
    ids=["flow", "shifted", "flow sample", "vp epsilon", "vp v", "cosine v", "cosine sample"],
)
@pytest.mark.parametrize("num_steps", [5, 20])
def test_known_noise_is_found_under_every_process(process: GaussianProcess, num_steps: int) -> None:
    denoiser, z = mixture(process=process), noise(100)
    sampler = Sampler(num_steps)
    x_0 = sampler.sample(denoiser, process, z, conditions(100))
    solver = FixedPoint(1e-9)
    inverted = sampler.invert(denoiser, process, x_0, conditions(100), solver)
    assert float((tensor_of(inverted.x_1) - z).abs().max()) < 1e-6


@torch.no_grad()
def error_of_known_pairs(
    pipeline: Pipeline, condition: Condition, num_steps: int, solver: FixedPoint | None = None
) -> tuple[float, int]:
    """Largest |z - T^-1(T z)| in single precision, and the iterations of the slowest sample."""
    pipeline.eval()
    sampler, process = Sampler(num_steps), pipeline.process
    noise = generators(range(len(condition)))
    z = process.prior(pipeline.blank(condition)).sample(noise)
    x_0 = sampler.sample(pipeline, process, z, condition)
    inverted = sampler.invert(pipeline, process, x_0, condition, solver)
    assert flatten(inverted.x_1).dtype == torch.float32
    assert (inverted.residuals <= 1e-5).all()
    return float((flatten(inverted.x_1) - flatten(z)).abs().max()), int(inverted.iterations.max())


@pytest.mark.parametrize("schedule", ["rectified_flow", "discrete_vp"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_known_noise_of_the_mixture_is_found(schedule: str, num_steps: int) -> None:
    kind = "velocity" if schedule == "rectified_flow" else "epsilon"
    pipeline = GaussianMixturePipeline(schedule=schedule, prediction_type=kind)
    condition = pipeline.encode({"index": torch.arange(64)})
    error, iterations = error_of_known_pairs(pipeline, condition, num_steps)
    assert error < 1e-4 and iterations < 100


SHAPES = Path(domains.text_to_image.pipeline.__file__).parent / "assets/shapes/unet"


@pytest.mark.skipif(
    not (SHAPES / "diffusion_pytorch_model.safetensors").exists(),
    reason="the embedded model is not trained yet",
)
def test_known_noise_of_the_shapes_model_is_found() -> None:
    pipeline = TextToImagePipeline("shapes", guidance_scale=1.0)
    condition = pipeline.encode({"prompt": ["a red ring"]})
    error, _ = error_of_known_pairs(pipeline, condition, 20, FixedPoint(1e-6))
    assert error < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "num_steps", "invertible"),
    [
        ("digits", 20, False),
        pytest.param("digits", 100, True, marks=pytest.mark.slow),
        pytest.param("shapes", 100, True, marks=pytest.mark.slow),
    ],
)
def test_known_noise_of_image_models_is_found_with_many_steps(
    model: str, num_steps: int, invertible: bool
) -> None:
    """The last steps collapse grey values: T of digits has an inverse with 80 steps, not with 40.

    In single precision rounding is amplified, for digits to 2e-3 at 80 and 1e-4 at 160, for shapes
    to 5e-3 at 100: this is in double.
    """
    pipeline = ImagePipeline(model).eval().double()
    condition, process = pipeline.encode({"index": torch.arange(1)}), pipeline.process
    sampler, solver = Sampler(num_steps), FixedPoint(1e-8, max_iterations=30)
    z = process.prior(pipeline.blank(condition)).sample(generators(range(1)))
    x_0 = sampler.sample(pipeline, process, z, condition)
    inverted = sampler.invert(pipeline, process, x_0, condition, solver)
    error = float((flatten(inverted.x_1) - flatten(z)).abs().max())
    if invertible:
        assert (inverted.residuals <= 1e-8).all() and error < 1e-4
    else:
        assert error > 0.1


@torch.no_grad()
def test_what_is_missed_is_what_the_residual_says() -> None:
    """The layout model's last steps collapse class scores: at ten steps T has no exact inverse."""
    pipeline = LayoutPipeline("grammar").eval()
    condition, process, sampler = pipeline.example().repeat(4), pipeline.process, Sampler(10)
    z = process.prior(pipeline.blank(condition)).sample(generators(range(4)))
    x_0 = sampler.sample(pipeline, process, z, condition)
    solver = FixedPoint(1e-5, max_iterations=30)
    inverted = sampler.invert(pipeline, process, x_0, condition, solver)
    again = sampler.sample(pipeline, process, inverted.x_1, condition)
    assert (inverted.residuals > 1e-3).any()
    missed = (flatten(again) - flatten(x_0)).abs().amax(dim=1)
    assert (missed < 5 * inverted.residuals + 1e-4).all()
    assert float((flatten(inverted.x_1) - flatten(z)).abs().max()) > 0.1


def test_guesses_off_the_subspace_come_back_to_it() -> None:
    """A centre that has moved by rounding is not carried on: no transition would take it away."""
    process = GaussianProcess(RectifiedFlow(), "velocity", PointClouds(num_coordinates=2))
    x_s = process.prior(torch.ones(2, 3, 2)).sample()
    t = torch.ones(2)
    guess = process.inverted(torch.zeros(2, 3, 2), x_s + 0.1, x_s, t, t - 0.5)
    torch.testing.assert_close(guess, x_s)


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    denoiser, x_0 = mixture(), mixture_points(9)
    whole = Sampler(6).invert(denoiser, FLOW, x_0, conditions(9))
    parts = [
        Sampler(6).invert(denoiser, FLOW, part, conditions(len(part))) for part in x_0.split([2, 7])
    ]
    torch.testing.assert_close(whole.x_1, torch.cat([tensor_of(part.x_1) for part in parts]))
    # Rounding may decide about the last iteration.
    iterations = torch.cat([part.iterations for part in parts])
    assert (whole.iterations - iterations).abs().max() <= 1


def test_fields_are_inverted_together() -> None:
    """A velocity that mixes two fields, beside the same one on a single tensor."""
    both = ProductProcess({"a": FLOW, "b": FLOW})

    def joint(x: State, t: Tensor, condition: Condition) -> State:
        assert isinstance(x, dict)
        v = torch.tanh(torch.cat([x["b"], x["a"]], dim=1)) * (1 + t.unsqueeze(1))
        return {"a": v[:, :2], "b": v[:, 2:]}

    def single(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        v = joint({"a": x[:, :2], "b": x[:, 2:]}, t, condition)
        assert isinstance(v, dict)
        return torch.cat([v["a"], v["b"]], dim=1)

    x = torch.randn(5, 4, dtype=torch.float64)
    fields = Sampler(4).invert(joint, both, {"a": x[:, :2], "b": x[:, 2:]}, conditions(5))
    plain = Sampler(4).invert(single, FLOW, x, conditions(5))
    torch.testing.assert_close(flatten(fields.x_1), tensor_of(plain.x_1))


def test_iterations_that_do_not_contract_are_reported() -> None:
    x_0 = torch.ones(3, 2, dtype=torch.float64)
    solver = FixedPoint(1e-6, 20, memory=0)
    inverted = Sampler(2).invert(lambda x, t, c: 4 * x, FLOW, x_0, conditions(3), solver)
    assert (inverted.residuals > 1).all() and (inverted.iterations == 40).all()


def test_what_cannot_be_inverted_is_refused_by_name() -> None:
    x_0, masked = torch.zeros(2, 3, dtype=torch.int64), MaskedProcess(4)
    with pytest.raises(UsageError, match=r"a MaskedProcess cannot be inverted.*continuous state"):
        Sampler(2).invert(lambda x, t, c: torch.zeros(2, 3, 4), masked, x_0, conditions(2))
    mixed = ProductProcess({"box": FLOW, "category": masked})
    fields = {"box": torch.zeros(2, 3), "category": x_0}
    with pytest.raises(UsageError, match=r"a ProductProcess cannot be inverted"):
        Sampler(2).invert(lambda x, t, c: x, mixed, fields, conditions(2))
    with pytest.raises(NotImplementedError, match="MaskedProcess"):
        mixed.inverted(fields, fields, fields, torch.ones(2), torch.zeros(2))
    with pytest.raises(UsageError, match=r"Sampler: eta must be 0"):
        Sampler(2, eta=0.5).invert(lambda x, t, c: x, FLOW, torch.zeros(2, 2), conditions(2))
