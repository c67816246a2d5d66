r"""Adjoint matching against closed forms, plain backpropagation, and the published loss.

One reverse step of a Gaussian is linear. All that follows from it is written out by hand here.
"""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import ComponentIndicator, Coordinate, Quadratic
from lit_rlft.algorithms.adjoint_matching import AdjointMatching, Matches
from lit_rlft.core.adjoint import (
    Match,
    adjoints,
    drawn_steps,
    match,
    memoryless_steps,
    memoryless_walk,
    near_noise,
)
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess, ProductProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import tensor_of
from lit_rlft.core.subspace import PointClouds
from lit_rlft.kit.saved_grids import Clip
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.strategy import FSDP2Strategy
from tests.support import assert_close_in_rounding, trainer_of

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SCHEDULES = {"rectified_flow": "velocity", "cosine_vp": "v", "discrete_vp": "epsilon"}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def normal(schedule: str = "rectified_flow", std: float = 1.0) -> GaussianMixturePipeline:
    """The exact model of N(0, std^2) in one dimension, in double precision."""
    kind: Any = {"schedule": schedule, "prediction_type": SCHEDULES[schedule]}
    return GaussianMixturePipeline([1.0], [[0.0]], [std], residual_width=0, **kind).double()


def bent(schedule: str) -> GaussianMixturePipeline:
    """A mixture whose residual network is not zero, in double precision."""
    kind: Any = {"schedule": schedule, "prediction_type": SCHEDULES[schedule]}
    pipeline = GaussianMixturePipeline(residual_width=8, **kind).double()
    assert pipeline.denoiser.residual is not None
    own = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(pipeline.denoiser.residual.fc3.weight, std=0.3, generator=own)
    return pipeline


def condition_of(pipeline: GaussianMixturePipeline, size: int) -> Condition:
    return pipeline.encode({"index": torch.arange(size)})


def full(value: float) -> Tensor:
    """One number as a state in double precision."""
    return torch.full((1, 1), value, dtype=torch.float64)


def matched(
    pipeline: GaussianMixturePipeline, num_steps: int, i: int, f: Any, x: Tensor, adjoint: Tensor
) -> Match:
    """Compare a prediction at step i with what its adjoint asks for."""
    process, number = pipeline.process, torch.tensor([i])
    steps = memoryless_steps(process, num_steps, x)
    base = pipeline(x, steps.t[number], condition_of(pipeline, 1))
    near = near_noise(process, steps.t[0], steps.s[0])
    return match(process, steps, number, tensor_of(f), base, x, adjoint, near)


def swept(
    pipeline: GaussianMixturePipeline, states: list[Tensor], adjoint: Tensor
) -> dict[int, Tensor]:
    """Return the adjoints by step."""
    num_steps, process = len(states) - 1, pipeline.process
    steps = memoryless_steps(process, num_steps, states[0])
    near = near_noise(process, steps.t[0], steps.s[0])
    args = (pipeline, process, steps, states, condition_of(pipeline, len(adjoint)), adjoint, near)
    return {i: tensor_of(own) for i, own, _ in adjoints(*args)}


@pytest.mark.parametrize("num_steps", [2, 5, 40])
def test_the_lean_adjoint_and_the_optimum_of_a_normal(num_steps: int) -> None:
    """a(t) = -lambda (1 - t) / ((1 - t)^2 + t^2); f* - f_base = -lambda t / ((1 - t)^2 + t^2).

    At any number of steps, for the chain's slopes are the exact ones of a normal.
    """
    pipeline, scale = normal(), 1.7
    states = [full(0.3) for _ in range(num_steps + 1)]
    found = swept(pipeline, states, full(-scale))
    for i in range(1, num_steps):
        t = 1 - i / num_steps
        size = (1 - t) ** 2 + t**2
        assert float(found[i]) == pytest.approx(-scale * (1 - t) / size, rel=1e-12)
        moved = pipeline(states[i], full(t)[0], condition_of(pipeline, 1)) - scale * t / size
        own = matched(pipeline, num_steps, i, moved, states[i], found[i])
        assert float(own.loss) < 1e-24 < float(own.start)


@pytest.mark.parametrize("num_steps", [2, 5, 40])
@each_schedule
def test_the_minimiser_is_the_denoiser_of_the_tilted_law(schedule: str, num_steps: int) -> None:
    """N(0, s^2) tilted by e^{lambda x} is N(lambda s^2, s^2), whose denoiser has a closed form."""
    pipeline, scale, std = normal(schedule, 0.8), 1.3, 0.8
    process, x = pipeline.process, full(0.4)
    found = swept(pipeline, [x] * (num_steps + 1), full(-scale))
    times, mean = process.times(num_steps), scale * std**2
    for i in range(num_steps):
        t = times[i].expand(1)
        alpha, sigma = process.schedule.levels(t)
        size = alpha**2 * std**2 + sigma**2
        x_0 = mean + alpha * std**2 / size * (x - alpha * mean)
        moved = process.prediction(x_0, (x - alpha * x_0) / sigma, t)
        own = matched(pipeline, num_steps, i, moved, x, found[i])
        # Pure noise takes the adjoint of a state near it, as exact as that is noise too.
        near = near_noise(process, times[0], times[1]) if i == 0 else None
        assert (near is None) == (i > 0 or schedule == "discrete_vp")
        bound = 1e-13
        if near is not None:
            alpha, sigma = process.schedule.levels(near.view(1))
            assert 0.02 < float(alpha) < 0.06
            bound = 1.01 * float(alpha / sigma * std) ** 4
        assert float(own.loss) < bound * float(own.start)


@pytest.mark.parametrize(
    ("knots", "num_steps"),
    [(None, 2), (None, 3), (None, 20), ([(0.2, 0.4), (0.9, 0.05)], 4), ([(0.1, 0.4)], 8)],
)
def test_the_optimum_does_not_depend_on_the_length_of_the_first_step(
    knots: list[tuple[float, float]] | None, num_steps: int
) -> None:
    """N(0, 1) tilted by e^x has the mean 1; the adjoint of states[1] alone gave from 0.47 on."""
    pipeline, size = normal(), 4000
    pipeline.process = process = GaussianProcess(RectifiedFlow(knots=knots), "velocity")
    condition, own = condition_of(pipeline, size), torch.Generator().manual_seed(0)
    x_1 = torch.randn(size, 1, generator=own, dtype=torch.float64)
    steps, shifts = memoryless_steps(process, num_steps, x_1), torch.zeros(num_steps).double()
    near = near_noise(process, steps.t[0], steps.s[0])

    def shifted(x: Tensor, t: Tensor, by: Tensor) -> Tensor:
        alpha, sigma = (level.unsqueeze(1) for level in process.schedule.levels(t))
        x_0 = process.denoised(pipeline(x, t, condition), x, t) + by
        return process.prediction(x_0, (x - alpha * x_0) / sigma, t)

    def policy(x: Any, t: Tensor, condition: Condition) -> Tensor:
        return shifted(x, t, shifts[int((steps.t - t[0]).abs().argmin())])

    for _ in range(2):
        walked = memoryless_walk(policy, process, x_1, condition, num_steps)
        adjoint = torch.full((size, 1), -1.0).double()
        found = adjoints(pipeline, process, steps, walked.states, condition, adjoint, near)
        for i, pull, base in found:
            x, t, number = tensor_of(walked.states[i]), steps.levels(i, size), torch.tensor([i])
            args = (process, steps, number.expand(size))
            losses = [
                match(*args, shifted(x, t, full(by)[0]), base, x, pull, near).loss.mean()
                for by in (-1.0, 0.0, 1.0)
            ]
            bend = losses[0] + losses[2] - 2 * losses[1]  # of a parabola in the shift
            shifts[i] = (losses[0] - losses[2]) / (2 * bend)
    last = tensor_of(memoryless_walk(policy, process, x_1, condition, num_steps).states[-1])
    assert float(last.mean()) == pytest.approx(1.0, abs=0.06)


@each_schedule
def test_the_lean_adjoint_is_the_gradient_through_the_walk(schedule: str) -> None:
    """By plain backpropagation from the reward, through the same steps under the same noise."""
    pipeline, size, num_steps, scale, center = bent(schedule), 4, 6, 1.7, (0.5, -0.2)
    process, condition = pipeline.process, condition_of(pipeline, size)
    x_1 = torch.randn(size, 2, dtype=torch.float64)
    steps, reward = memoryless_steps(process, num_steps, x_1), Quadratic(center).double()

    def mean(i: int, x: Tensor) -> Tensor:
        prediction = pipeline(x, steps.levels(i, size), condition)
        return tensor_of(process.step(prediction, x, steps.row(i)).mean)

    with torch.no_grad():
        walked = memoryless_walk(pipeline, process, x_1, condition, num_steps)
        states = [tensor_of(state) for state in walked.states]
        noise = [states[i + 1] - mean(i, states[i]) for i in range(num_steps)]
    found = swept(pipeline, states, 2 * scale * (states[-1] - torch.tensor(center).double()))
    own_start = near_noise(process, steps.t[0], steps.s[0]) is None
    for i in range(0 if own_start else 1, num_steps):
        x = start = states[i].clone().requires_grad_()
        for j in range(i, num_steps):
            x = mean(j, x) + noise[j]
        (wanted,) = torch.autograd.grad(-scale * reward(x, condition).sum(), start)
        torch.testing.assert_close(found[i], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", ["rectified_flow", "cosine_vp"])
def test_the_adjoint_of_the_start_is_that_of_the_first_state_noised(schedule: str) -> None:
    """A bent model has another slope elsewhere: at the state after the first step, near noise."""
    pipeline, seeds = bent(schedule), range(4)
    process, condition = pipeline.process, condition_of(pipeline, 4)
    x_1 = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = memoryless_walk(pipeline, process, x_1, condition, 3, generators(seeds)).states
    steps = memoryless_steps(process, 3, x_1)
    near = near_noise(process, steps.t[0], steps.s[0])
    assert near is not None and near > steps.s[0]
    args = (pipeline, process, steps, states, condition, torch.ones_like(x_1), near)
    *_, (_, after, _), (i, found, base) = adjoints(*args, generators(seeds))
    t, s = near.expand(4), steps.s[0].expand(4)
    x_t = process.noised(states[1], s, t, generators(seeds)).requires_grad_()
    law: Any = process.transition(pipeline(x_t, t, condition), x_t, t, s, 1.0)
    (expected,) = torch.autograd.grad(law.mean, x_t, after)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(base, pipeline(x_1, steps.levels(0, 4), condition).detach(), **EXACT)
    assert i == 0 and base.abs().min() > 0


@pytest.mark.parametrize("scale", [1.0, 2.0**-23])
def test_small_adjoints_do_not_vanish_in_half_precision(scale: float) -> None:
    """They are linear in the reward: of float16's numbers those below 6e-8 are 0."""
    pipeline = bent("discrete_vp").float()
    states = [*torch.randn(7, 4, 2)]
    adjoint = torch.randn(4, 2) * torch.tensor([[1.0], [0.1], [0.01], [1.0]])
    expected = swept(pipeline, states, adjoint)
    with torch.autocast("cpu", torch.float16):
        found = swept(pipeline, states, scale * adjoint)
    for i, own in expected.items():
        errors = (found[i] / scale - own).norm(dim=1) / own.norm(dim=1)
        assert float(errors.max()) < 0.02


def test_small_gradients_of_rewards_do_not_vanish_in_half_precision() -> None:
    """That of a mean over a million pixels, through a decoder in float16."""
    pipeline = normal().float()
    pipeline.decode = lambda x_0, condition: functional.linear(tensor_of(x_0), torch.eye(1)).float()  # type: ignore[method-assign]
    tuner = tuner_of(pipeline, reward=WeightedSum({"x": Coordinate()}, {"x": 2e-7}))
    with torch.autocast("cpu", torch.float16):
        _, adjoint = tuner._from_reward(torch.randn(3, 1), condition_of(pipeline, 3))
    expected = torch.full((3, 1), -2e-7 * tuner.reward_scale)
    torch.testing.assert_close(tensor_of(adjoint), expected, rtol=2e-3, atol=0)


def test_small_steps_give_the_published_loss_times_their_length() -> None:
    """|(2 / sig)(f_base - f) + sig a|^2 with sig^2 = 2 t / (1 - t), halved."""
    pipeline, num_steps = normal(), 4000
    own = torch.Generator().manual_seed(0)
    f, adjoint = torch.randn(2, 1, 1, generator=own, dtype=torch.float64)
    for i in (800, 2000, 3200):
        t, x = 1 - i / num_steps, full(0.7)
        base = pipeline(x, full(t)[0], condition_of(pipeline, 1))
        sig = math.sqrt(2 * t / (1 - t))
        published = ((2 / sig) * (base - f) + sig * adjoint).square().mean() / 2
        loss = matched(pipeline, num_steps, i, f, x, adjoint).loss
        assert float(loss) * num_steps == pytest.approx(float(published), rel=3e-3)


@each_schedule
def test_where_a_sample_starts_says_nothing_of_where_it_ends(schedule: str) -> None:
    """At eta = 1 and with no signal at t = 1; of SD's table alpha is 0.07 there."""
    pipeline, size = normal(schedule, 0.5), 6
    condition = condition_of(pipeline, size)
    ends = [
        tensor_of(
            memoryless_walk(
                pipeline, pipeline.process, x_1, condition, 8, generators(range(size))
            ).states[-1]
        )
        for x_1 in (torch.full((size, 1), v, dtype=torch.float64) for v in (-2.0, 2.0))
    ]
    apart = float((ends[0] - ends[1]).abs().max())
    assert apart < (0.2 if schedule == "discrete_vp" else 1e-12)


def test_of_an_adjoint_counts_what_lies_in_the_subspace_of_the_noise() -> None:
    """Of point clouds: neither empty slots nor a shift of all points; other channels all."""
    clouds, flow = PointClouds(3), RectifiedFlow()
    process = GaussianProcess(flow, "velocity", clouds)
    x = torch.randn(2, 5, 4)
    x[1, 3:] = 0
    adjoint = clouds.project(torch.randn(2, 5, 4), x)
    shifted = adjoint.clone()
    shifted[..., :3] += 7.0
    shifted[1, 3:] += 9.0
    steps, numbers = memoryless_steps(process, 4, x), torch.tensor([2, 3])
    f = torch.randn(2, 5, 4)
    found = [match(process, steps, numbers, f, f, x, own, steps.t[1]) for own in (adjoint, shifted)]
    assert_close_in_rounding(found[0].loss, found[1].loss)
    size = torch.tensor([5 * 4 - 3, 3 * 4 - 3])
    rates = []
    for t, before in ((0.5, 0.75), (0.25, 0.5)):
        growth = ((1 - t) / t) ** 2 - ((1 - before) / before) ** 2
        rates.append(growth * (t**2 / (1 - t)) ** 2)
    wanted = 0.5 * torch.tensor(rates) * adjoint.square().sum(dim=(1, 2))
    torch.testing.assert_close(found[0].start, wanted / size)
    both = ProductProcess({"a": process, "b": GaussianProcess(flow, "velocity")})
    state, pull = {"a": x, "b": torch.zeros(2, 3)}, {"a": adjoint, "b": torch.ones(2, 3)}
    own = match(both, steps, numbers, state, state, state, pull, steps.t[1])
    other = 0.5 * torch.tensor(rates) * 3
    torch.testing.assert_close(own.start, (wanted + other) / (size + 3))


def test_half_of_the_steps_are_from_the_last_quarter() -> None:
    chosen = drawn_steps(20, 4, generators(range(1500)), 1500)
    assert all(len(set(own)) == 4 for own in chosen.tolist())
    assert ((chosen >= 15).sum(dim=1) == 2).all()
    shares = torch.bincount(chosen.flatten(), minlength=20) / 1500
    torch.testing.assert_close(shares[15:], torch.full((5,), 0.4), rtol=0, atol=0.06)
    torch.testing.assert_close(shares[:15], torch.full((15,), 2 / 15), rtol=0, atol=0.05)
    # An odd number of them: a coin decides for the odd one.
    for num in (1, 3):
        odd = drawn_steps(20, num, generators(range(1500)), 1500)
        assert set((odd >= 15).sum(dim=1).tolist()) == {num // 2, num // 2 + 1}
        shares = torch.bincount(odd.flatten(), minlength=20) / 1500
        assert float(shares[15:].sum()) == pytest.approx(num / 2, abs=0.05)
        torch.testing.assert_close(shares[:15], torch.full((15,), num / 30), rtol=0, atol=0.05)
    for num_steps, num in ((2, 1), (2, 2), (5, 5), (9, 7), (3, 2)):
        few = drawn_steps(num_steps, num, generators(range(50)), 50)
        assert few.shape == (50, num) and int(few.max()) < num_steps
        assert all(len(set(own)) == num for own in few.tolist())


def tuner_of(
    pipeline: GaussianMixturePipeline, reward: Reward | None = None, **settings: Any
) -> AdjointMatching:
    base: dict[str, Any] = {"sampler": Sampler(6, 1.0), "num_candidates": 2, "num_matched": 3}
    tuner = AdjointMatching(pipeline, reward or Quadratic((0.5, 0.0)), **{**base, **settings})
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    return tuner


def collected(tuner: AdjointMatching, size: int = 5) -> Matches:
    batch = {"index": torch.arange(size)}
    tuner.eval()
    with torch.no_grad():
        return tuner.collect(batch, tuner.pipeline.encode(batch))


def gradient_of(tuner: AdjointMatching, experience: Matches, size: int) -> list[Tensor]:
    """The gradient of an update in microbatches of some size."""
    trained = list(tuner._trained().values())
    total = [torch.zeros_like(p) for p in trained]
    for rows in torch.arange(experience.num_terms).split(size):
        losses, _ = tuner.loss(experience.terms(rows), None)
        for own, part in zip(total, torch.autograd.grad(losses.sum(), trained), strict=True):
            own += part
    return total


def test_at_the_start_the_control_is_0_and_costs_nothing() -> None:
    tuner = tuner_of(bent("rectified_flow"))
    experience = collected(tuner)
    assert experience.metrics["control_cost"] == pytest.approx(0, abs=1e-20)
    losses, values = tuner.loss(experience.terms(torch.arange(30)), None)
    assert len(losses) == 30 == experience.num_terms
    torch.testing.assert_close(3 * losses, values["reference_loss"])
    assert experience.terms_per_sample.tolist() == [3] * 10


def test_the_reference_loss_is_that_of_the_pairs_that_count() -> None:
    """Before anything is learned it is the loss, of the same pairs."""
    tuner = tuner_of(bent("rectified_flow"), loss_quantile=0.6)
    experience = collected(tuner, 20)
    losses, values = tuner.loss(experience.terms(torch.arange(experience.num_terms)), None)
    assert 0 < int((losses == 0).sum()) < len(losses)
    torch.testing.assert_close(3 * losses, values["reference_loss"])


def test_steps_that_clip_are_refused() -> None:
    pipeline = bent("rectified_flow")
    pipeline.process.bound = Clip(1.0)
    with pytest.raises(UsageError, match=r"clip nothing.*set clip_sample.*p_graft.yaml"):
        tuner_of(pipeline)
    pipeline.process = ProductProcess({"x": pipeline.process})
    with pytest.raises(UsageError, match="clip nothing"):
        tuner_of(pipeline)


def test_the_loss_by_hand_after_the_model_has_moved() -> None:
    tuner = tuner_of(bent("rectified_flow"), reward_scale=2.0)
    with torch.no_grad():
        tuner.pipeline.denoiser.means += 0.1
    experience = collected(tuner, 8)
    assert experience.metrics["control_cost"] > 0
    rows = torch.arange(experience.num_terms)
    losses, _ = tuner.loss(experience.terms(rows), None)
    kept = {name: tensor_of(state).flatten(0, 1) for name, state in experience.states.items()}
    times, given = tuner.pipeline.process.times(6), condition_of(tuner.pipeline, len(rows))
    assert set(kept["step"].tolist()) == set(range(6))
    t, x = times[kept["step"]], kept["x_t"]
    f, base = (tensor_of(of(x, t, given)) for of in (tuner.pipeline, tuner.reference))
    torch.testing.assert_close(base, kept["base"], **EXACT)
    level, before = (times[kept["step"].clamp(min=1) - i] for i in (0, 1))
    rate = (((1 - level) / level) ** 2 - ((1 - before) / before) ** 2).sqrt()
    near = tuner._near
    assert near is not None and 0.05 <= 1 - float(near) < 0.051
    pulled = near.where(kept["step"] == 0, t)
    pull = rate * pulled**2 / (1 - pulled)
    apart = rate.unsqueeze(1) * (base - f) * t.unsqueeze(1)  # x_0 = x - t f
    wanted = 0.5 * (apart + pull.unsqueeze(1) * kept["adjoint"]).square().mean(dim=1) / 3
    torch.testing.assert_close(losses, wanted, **EXACT)


@pytest.mark.parametrize(("scale", "weak"), [(0.01, True), (50.0, False)])
def test_a_scale_that_would_tilt_next_to_nothing_warns(
    scale: float, weak: bool, recwarn: pytest.WarningsRecorder
) -> None:
    experience = collected(tuner_of(bent("rectified_flow"), reward_scale=scale), 64)
    assert experience.histograms is not None
    deviation = float(experience.histograms["reward"].std(correction=0))
    assert experience.metrics["tilt"] == pytest.approx(scale * deviation)
    sentences = [str(warning.message) for warning in recwarn if "reward_scale" in str(warning)]
    if not weak:
        assert not sentences
        return
    (sentence,) = sentences
    assert "reward_scale is 0.01 and " in sentence
    assert f"by about {scale * deviation**2:.2g}; " in sentence
    assert sentence.endswith(
        f"--model.reward_scale {1 / deviation:.2g} it would be about {deviation:.2g}"
    )


def test_the_cost_of_control_is_the_divergence_of_the_paths() -> None:
    """Log-ratios of the paths' densities, averaged, are as large within their error."""
    tuner = tuner_of(bent("cosine_vp"), sampling_batch_size=512)
    pipeline, process = tuner.pipeline, tuner.pipeline.process
    with torch.no_grad():
        tuner.pipeline.denoiser.means += 0.15
        experience = collected(tuner, 256)
        condition = condition_of(pipeline, 2000)
        x_1 = process.prior(pipeline.blank(condition)).sample()
        walked = memoryless_walk(pipeline, process, x_1, condition, 6)
        steps = memoryless_steps(process, 6, x_1)
        ratios = torch.zeros(2000).double()
        for i in range(6):
            x, t, row = walked.states[i], steps.levels(i, 2000), steps.row(i)
            own = process.step(walked.predictions[i], x, row)
            base = process.step(tuner.reference(x, t, condition), x, row)
            ratios += own.log_prob(walked.states[i + 1]) - base.log_prob(walked.states[i + 1])
    error = float(ratios.std()) / 2000**0.5
    assert experience.metrics["control_cost"] == pytest.approx(float(ratios.mean()), abs=4 * error)


def test_gradients_depend_on_neither_chunks_nor_microbatches() -> None:
    def gradient(microbatch: int, **settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        tuner = tuner_of(bent("rectified_flow"), **settings)
        with torch.no_grad():
            tuner.pipeline.denoiser.means += 0.1
        return gradient_of(tuner, collected(tuner), microbatch)

    whole = gradient(30)
    assert any(own.any() for own in whole)
    for one, other in zip(whole, gradient(7, sampling_batch_size=3), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_adjoint_runs_through_the_model_without_its_adapter() -> None:
    lora = tuner_of(bent("rectified_flow").float(), lora=LoRA(rank=2))
    whole = tuner_of(bent("rectified_flow").float())
    before = collected(lora).states
    for name, own in collected(whole).states.items():
        torch.testing.assert_close(before[name], own)
    with torch.no_grad():
        for name, parameter in lora._trained().items():
            if "lora_B" in name:
                parameter += 0.2
    moved = collected(lora)
    steps, x_t = tensor_of(moved.states["step"])[:, 0], tensor_of(moved.states["x_t"])[:, 0]
    t = memoryless_steps(lora.pipeline.process, 6, x_t).t[steps]
    wanted = whole.reference(x_t, t, moved.condition)
    torch.testing.assert_close(tensor_of(moved.states["base"])[:, 0], wanted)
    assert not torch.equal(tensor_of(lora.pipeline(x_t, t, moved.condition)), tensor_of(wanted))
    assert all(p.grad is None for p in lora._trained().values())


def test_what_a_round_costs(tmp_path: Path) -> None:
    """T rows of the tuned model, T + 1 of the frozen one, K of the update; and one reward."""
    tuner = tuner_of(bent("rectified_flow").float(), num_epochs=2)
    trainer_of(default_root_dir=tmp_path).fit(tuner, MixtureData(num_train=8, batch_size=4))
    spent = tuner.meter.training
    assert spent.denoiser_calls == 2 * 8 * (6 + 7 + 2 * 3)
    assert spent.reward_calls == tuner.num_samples == 16
    assert tuner.num_updates == 4


def test_pairs_above_the_quantile_are_left_out() -> None:
    tuner = tuner_of(bent("rectified_flow"), loss_quantile=0.8)
    experience = collected(tuner, 10)
    weights = tensor_of(experience.states["weight"]).flatten()
    losses = tuner.loss(experience.terms(torch.arange(60)), None)[0]
    own = tensor_of(tuner_loss(tuner, experience))
    kept = weights > 0
    assert int(kept.sum()) == 48  # 80 % of 60
    assert own[kept].max() <= own[~kept].min() and not losses[~kept].any()
    assert weights[kept].tolist() == pytest.approx([1 / 3] * 48)


def tuner_loss(tuner: AdjointMatching, experience: Matches) -> Tensor:
    """The losses of all pairs as if none were left out."""
    terms = experience.terms(torch.arange(experience.num_terms))
    terms.states["weight"] = torch.ones(experience.num_terms)  # type: ignore[index]
    return tuner.loss(terms, None)[0]


class Steep(Reward):
    """Has an infinite gradient at the samples right of 0."""

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return (samples[:, 0].clamp(max=0) - samples[:, 0].clamp(max=0)).abs().sqrt()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "reward": ({"reward": ComponentIndicator()}, "needs a differentiable reward, but Component"),
    "scale": ({"reward_scale": 0.0}, "reward_scale must be positive"),
    "matched": ({"num_matched": 0}, "num_matched must be at least 1"),
    "one step": ({"sampler": Sampler(1), "num_matched": 1}, "sampler.num_steps must be 2 or more"),
    "quantile": ({"loss_quantile": 1.5}, r"loss_quantile must be in \(0, 1\]"),
    "candidates": ({"num_candidates": 0}, "num_candidates must be at least 1"),
    "normalised": (
        {"reward": WeightedSum({"a": Coordinate()}, {"a": 1.0}, normalize=True)},
        "scores a few samples at a time",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        tuner_of(normal(), **settings)


def test_masked_states_are_refused_by_name() -> None:
    pipeline = normal()
    pipeline.process = MaskedProcess(3)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"MaskedProcess of.*use configs/algorithms/p_graft"):
        tuner_of(pipeline)


def test_weights_that_are_split_are_refused() -> None:
    tuner = tuner_of(normal())
    tuner._trainer = SimpleNamespace(strategy=FSDP2Strategy())  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"fsdp2 lets go of .* use ddp"):
        tuner.check()


def test_an_infinite_gradient_ends_the_round_before_an_update() -> None:
    tuner = tuner_of(bent("rectified_flow"), Steep())
    with pytest.raises(UsageError, match="the gradient of Steep is not finite"):
        collected(tuner)


def drawn(tuner: AdjointMatching, num: int, num_steps: int, eta: float) -> Tensor:
    """Draw from the tuned model."""
    pipeline, condition = tuner.pipeline, condition_of(tuner.pipeline, num)
    own = generators(range(10**6, 10**6 + num))
    with torch.no_grad():
        x_1 = tuner.prior(condition).sample(own)
        args = (pipeline, pipeline.process, x_1, condition, own)
        return tensor_of(Sampler(num_steps, eta).sample(*args))


def test_it_learns_the_tilted_normal() -> None:
    """N(0, 0.7^2) under the reward 2 x becomes N(0.98, 0.7^2), for a sampler without noise too."""
    flow: Any = {"schedule": "rectified_flow", "prediction_type": "velocity", "residual_width": 0}
    pipeline = GaussianMixturePipeline([1.0], [[0.0]], [0.7], **flow)
    settings: Any = {"num_matched": 6, "reward_scale": 2.0, "sampler": Sampler(6, 1.0)}
    tuner = tuner_of(pipeline, Coordinate(), **settings)
    experience = collected(tuner, 16)
    terms = experience.terms(torch.arange(experience.num_terms))
    weights = [pipeline.denoiser.means, pipeline.denoiser.log_stds]
    optimizer = torch.optim.LBFGS(weights, max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tuner.loss(terms, None)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert pipeline.denoiser.means.item() == pytest.approx(0.98, abs=0.02)
    assert pipeline.denoiser.log_stds.exp().item() == pytest.approx(0.7, abs=0.02)
    x = drawn(tuner, 2000, 40, eta=0.0)
    assert float(x.mean()) == pytest.approx(0.98, abs=0.06)
    assert float(x.std()) == pytest.approx(0.7, abs=0.06)
    # The shift of x_0 in closed form, times what the ratio of signal to noise grows in each step;
    # the last step has no noise, and no control.
    ratios = [((1 - t) / t) ** 2 for t in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    shifts = [2 * 0.49 / (1 + 0.49 * ratio) for ratio in ratios]
    costs = [(b - a) * d**2 / 2 for (a, b), d in zip(pairwise(ratios), shifts, strict=False)]
    assert collected(tuner, 16).metrics["control_cost"] == pytest.approx(sum(costs), rel=0.08)
