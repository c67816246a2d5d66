r"""Reward gradients against closed forms and against plain backpropagation written out by hand.

One reverse step is linear, :math:`x_s = A x_t + B v`, with A and B read off the process at unit
inputs. The hand-written walk below knows nothing of plans or of `GradientWalk`.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import ComponentIndicator, Quadratic
from domains.molecule.pipeline import MoleculePipeline
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.reward_gradient import GradientWalk, RewardGradient
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import (
    AlignProp,
    DRaFT,
    DRaFTLV,
    DRTune,
    GradientMethod,
    GradientPlan,
    ReFL,
)
from lit_rlft.core.process import GaussianProcess, MaskedProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.state import tensor_of
from lit_rlft.core.subspace import occupied
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA

T, SIZE, SEEDS = 6, 5, tuple(range(5))
CENTER = (0.75, -0.5)  # exact in single precision too
EXACT = {"rtol": 1e-10, "atol": 1e-12}
METHODS: dict[str, GradientMethod] = {
    "DRTune": DRTune(k=2, m=3),
    "DRTune, inputs attached": DRTune(k=2, m=3, detach_input=False),
    "DRaFT-1": DRaFT(1),
    "DRaFT-3": DRaFT(3),
    "DRaFT-LV": DRaFTLV(2),
    "AlignProp": AlignProp(),
    "ReFL": ReFL(m=3),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def tuner_of(method: GradientMethod, eta: float = 0.0, **settings: Any) -> RewardGradient:
    """A float64 tuner of a mixture whose residual network is not zero."""
    pipeline = GaussianMixturePipeline(
        schedule=settings.pop("schedule", "cosine_vp"),
        prediction_type=settings.pop("prediction_type", "v"),
        residual_width=8,
    ).double()
    assert pipeline.denoiser.residual is not None
    torch.nn.init.normal_(
        pipeline.denoiser.residual.fc3.weight,
        std=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    reward = settings.pop("reward", Quadratic(CENTER))
    sampler = Sampler(settings.pop("num_steps", T), eta)
    tuner = RewardGradient(pipeline, reward, method=method, sampler=sampler, **settings)
    tuner.setup("fit")
    return tuner


def experience_of(tuner: RewardGradient, size: int = SIZE) -> Experience:
    condition = tuner.pipeline.encode({"index": torch.arange(size)})
    return Experience({}, condition, list(range(size)))


def gradients(loss: Tensor, tuner: RewardGradient) -> list[Tensor]:
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def drawn_plan(tuner: RewardGradient) -> GradientPlan:
    return tuner.draw_plan()


def coefficients(tuner: RewardGradient, i: int) -> tuple[Tensor, Tensor]:
    """A and B of the step from times[i] to times[i + 1]."""
    return linear(
        lambda v, x, t, s: tensor_of(tuner.pipeline.process.transition(v, x, t, s, 0.0).mean),
        *level_pair(tuner, i),
    )


def level_pair(tuner: RewardGradient, i: int) -> tuple[Tensor, Tensor]:
    times = tuner.pipeline.process.times(tuner.sampler.num_steps)
    return times[i].expand(1), times[i + 1].expand(1)


def linear(function: Callable[..., Tensor], t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    return function(zero, one, t, s)[0, 0], function(one, zero, t, s)[0, 0]


def walk_by_hand(
    tuner: RewardGradient, trained: Iterable[int], stop: int | None, detach_input: bool
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Walk with eta 0: return x_0, and (step, x_t) of every step that ran."""
    pipeline, process = tuner.pipeline, tuner.pipeline.process
    condition = experience_of(tuner).condition
    noise = generators(SEEDS)
    x = tensor_of(process.prior(pipeline.blank(condition)).sample(noise))
    seen = []
    for step in range(tuner.sampler.num_steps, 0, -1):
        i = tuner.sampler.num_steps - step
        t, _ = level_pair(tuner, i)
        seen.append((step, x))
        source = x.detach() if detach_input else x
        v = tensor_of(pipeline(source, t.expand(SIZE), condition))
        v = v if step in set(trained) else v.detach()
        if step == stop:
            a, b = linear(lambda v, x, t, s: tensor_of(process.denoised(v, x, t)), t, t)
            return a * x + b * v, seen
        a, b = coefficients(tuner, i)
        x = a * x + b * v
    return x, seen


def reward_of(tuner: RewardGradient, x_0: Tensor) -> Tensor:
    return tuner.reward(x_0, experience_of(tuner).condition)


@pytest.mark.parametrize("update", range(6))
@pytest.mark.parametrize("schedule", ["cosine_vp", "rectified_flow", "discrete_vp"])
def test_drtune_is_the_sum_of_scaled_jacobians(update: int, schedule: str) -> None:
    """ALGORITHMS of the paper: sum over trained t of coef_t (d f(x_t) / d theta)^T grad r."""
    tuner = tuner_of(DRTune(k=3, m=3), schedule=schedule)
    tuner.num_updates = update
    plan = drawn_plan(tuner)
    assert plan.stop is not None and len(plan.trained) == 3
    with torch.no_grad():
        x_0, seen = walk_by_hand(tuner, (), plan.stop, detach_input=True)
    pull = -2 * (x_0 - torch.tensor(CENTER, dtype=torch.float64))  # of the quadratic reward
    condition = experience_of(tuner).condition

    t, _ = level_pair(tuner, T - plan.stop)
    a, coefficient = linear(
        lambda v, x, t, s: tensor_of(tuner.pipeline.process.denoised(v, x, t)), t, t
    )
    scalars, through = {plan.stop: coefficient}, a
    for step in range(plan.stop + 1, T + 1):
        a, b = coefficients(tuner, T - step)
        scalars[step], through = through * b, through * a
    expected = [torch.zeros_like(p) for p in tuner.trainable().parameters()]
    for step, x_t in seen:
        if step in plan.trained:
            t, _ = level_pair(tuner, T - step)
            prediction = tensor_of(tuner.pipeline(x_t, t.expand(SIZE), condition))
            for total, part in zip(
                expected,
                gradients((prediction * pull).sum() * -scalars[step], tuner),
                strict=True,
            ):
                total += part

    losses, _ = tuner.loss(experience_of(tuner), generators(SEEDS))
    assert any(bool(g.abs().max() > 1e-3) for g in expected)
    torch.testing.assert_close(gradients(losses.sum(), tuner), expected, **EXACT)


@pytest.mark.parametrize("update", range(4))
@each_method
def test_gradients_are_those_of_masked_backpropagation(method: GradientMethod, update: int) -> None:
    if isinstance(method, DRaFTLV):
        pytest.skip("its copies have a test of their own")
    tuner = tuner_of(method)
    tuner.num_updates = update
    plan = drawn_plan(tuner)
    x_0, _ = walk_by_hand(tuner, plan.trained, plan.stop, method.detach_input)
    by_hand = gradients(-reward_of(tuner, x_0).sum(), tuner)
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    assert any(bool(g.abs().max() > 1e-6) for g in by_hand)
    torch.testing.assert_close(gradients(losses.sum(), tuner), by_hand, **EXACT)
    torch.testing.assert_close(values["reward"], reward_of(tuner, x_0).detach(), **EXACT)


@pytest.mark.parametrize("noisy", [False, True])
def test_draft_lv_averages_the_last_step_over_copies(noisy: bool) -> None:
    """Also where samples are taken for data at a level of some noise, as Stable Diffusion's are."""
    tuner = tuner_of(DRaFTLV(num_copies=3))
    if noisy:
        schedule = DiscreteVP(vp_betas(), steps_offset=1, ends_at_zero=False)
        tuner.pipeline.process = GaussianProcess(schedule, "v")
    condition, process = experience_of(tuner).condition, tuner.pipeline.process
    with torch.no_grad():
        x_0, _ = walk_by_hand(tuner, (), None, detach_input=False)
    noise = generators(SEEDS)
    process.prior(tuner.pipeline.blank(condition)).sample(noise)  # what the walk draws first
    t, s = level_pair(tuner, T - 1)
    a, b = coefficients(tuner, T - 1)
    rewards = []
    for _ in range(3):
        x_t = tensor_of(process.noised(x_0, s.expand(SIZE), t.expand(SIZE), noise))
        prediction = tensor_of(tuner.pipeline(x_t, t.expand(SIZE), condition))
        rewards.append(reward_of(tuner, a * x_t + b * prediction))
    mean = torch.stack(rewards).mean(dim=0)
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    torch.testing.assert_close(values["reward"], mean.detach(), **EXACT)
    by_hand = gradients(-mean.sum(), tuner)
    torch.testing.assert_close(gradients(losses.sum(), tuner), by_hand, **EXACT)


@pytest.mark.parametrize("update", range(3))
def test_a_detached_input_has_no_gradient(update: int) -> None:
    """d r / d x_1 is the linear part of the sampler alone: the network's Jacobian adds zero."""
    tuner = tuner_of(DRTune(k=2, m=3))
    tuner.num_updates = update
    plan, leaf = drawn_plan(tuner), torch.empty(0)
    prior, policy = tuner.prior, tuner.pipeline.forward

    class Leaf:
        def sample(self, rows: Any) -> Tensor:
            nonlocal leaf
            leaf = tensor_of(prior(experience_of(tuner).condition).sample(rows)).requires_grad_()
            return leaf

    inputs: list[Tensor] = []

    def seen(x_t: Any, t: Tensor, condition: Any) -> Any:
        if torch.is_grad_enabled():
            inputs.append(x_t.requires_grad_())
            return policy(inputs[-1], t, condition)
        return policy(x_t, t, condition)

    tuner.prior = lambda condition: Leaf()  # type: ignore[method-assign,assignment,return-value]
    tuner.pipeline.forward = seen  # type: ignore[method-assign]
    losses, _ = tuner.loss(experience_of(tuner), generators(SEEDS))
    del tuner.pipeline.forward
    x_0, _ = walk_by_hand(tuner, (), plan.stop, detach_input=True)
    assert plan.stop is not None
    t, _ = level_pair(tuner, T - plan.stop)
    through, _ = linear(
        lambda v, x, t, s: tensor_of(tuner.pipeline.process.denoised(v, x, t)), t, t
    )
    for step in range(plan.stop + 1, T + 1):
        through = through * coefficients(tuner, T - step)[0]
    pull = 2 * (x_0 - torch.tensor(CENTER, dtype=torch.float64))
    at_noise, *at_inputs = torch.autograd.grad(losses.sum(), [leaf, *inputs])
    torch.testing.assert_close(at_noise, (through * pull).detach(), **EXACT)
    # The inputs are leaves of their own: what the network passes back to them goes nowhere else.
    assert len(at_inputs) == len(plan.trained) and all(x.is_leaf for x in inputs)


@each_method
def test_steps_without_gradient_build_no_graph(method: GradientMethod) -> None:
    tuner = tuner_of(method)
    graphs: list[bool] = []
    policy = tuner.pipeline.forward

    def counted(*arguments: Any) -> Any:
        prediction = policy(*arguments)
        graphs.append(prediction.requires_grad)
        return prediction

    tuner.pipeline.forward = counted  # type: ignore[method-assign]
    tuner.loss(experience_of(tuner), generators(SEEDS))
    plan = drawn_plan(tuner)
    if isinstance(method, DRaFTLV):
        assert graphs == [False] * T + [True]
    else:
        steps = range(T, (plan.stop or 1) - 1, -1)
        assert graphs == [step in plan.trained for step in steps]


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_of_the_sampler_is_reparameterised(eta: float) -> None:
    """With noise, x_0 is still a function of theta, whose derivative is a finite difference."""
    tuner = tuner_of(DRaFT(T), eta=eta)
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    condition, noise = experience_of(tuner).condition, generators(SEEDS)
    with torch.no_grad():
        start = (tuner.pipeline.process, tuner.prior(condition).sample(noise), condition, noise)
        x_0 = tensor_of(tuner.sampler.sample(tuner.pipeline, *start))
    torch.testing.assert_close(values["reward"], reward_of(tuner, x_0), **EXACT)
    means = tuner.pipeline.denoiser.means
    index = [p is means for p in tuner.trainable().parameters()].index(True)
    exact = gradients(losses.sum(), tuner)[index][0, 0]
    step = 1e-6
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            means[0, 0] += sign * step
            ends.append(tuner.loss(experience_of(tuner), generators(SEEDS))[0].sum())
            means[0, 0] -= sign * step
    torch.testing.assert_close(exact, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def plans(method: GradientMethod, num_steps: int, count: int = 3000) -> list[GradientPlan]:
    generator = torch.Generator().manual_seed(0)
    return [method.draw(num_steps, generator) for _ in range(count)]


def test_every_update_draws_a_plan_that_all_processes_share() -> None:
    tuner, other = (tuner_of(AlignProp()) for _ in range(2))
    drawn = []
    for update in range(12):
        tuner.num_updates = other.num_updates = update
        drawn.append(drawn_plan(tuner))
        assert drawn_plan(other) == drawn[-1]
    assert len(set(drawn)) > 3


def test_drtune_spreads_its_steps_over_those_that_run() -> None:
    drawn = plans(DRTune(k=3, m=4), 12)
    for plan in drawn:
        assert plan.stop is not None
        steps, executed = sorted(plan.trained), 12 - plan.stop + 1
        assert len(steps) == 3 and plan.stop <= steps[0] and steps[-1] <= 12
        assert {b - a for a, b in pairwise(steps)} == {executed // 3}
    assert {plan.stop for plan in drawn} == {1, 2, 3, 4}
    assert set.union(*(set(plan.trained) for plan in drawn)) == set(range(1, 13))


def test_drtune_without_an_early_stop_is_the_papers_rule() -> None:
    """{s + i floor(T / K)} with s uniform on {1, ..., T - (K - 1) floor(T / K)}."""
    drawn = plans(DRTune(k=3, m=1), 11)
    firsts = [min(plan.trained) for plan in drawn]
    assert [plan.trained for plan in drawn] == [{s, s + 3, s + 6} for s in firsts]
    shares = torch.bincount(torch.tensor(firsts), minlength=6)[1:] / len(drawn)
    torch.testing.assert_close(shares, torch.full((5,), 0.2), rtol=0, atol=0.03)


def test_align_prop_cuts_once() -> None:
    drawn = plans(AlignProp(), 10)
    assert all(plan.trained == set(range(1, len(plan.trained) + 1)) for plan in drawn)
    shares = torch.bincount(torch.tensor([len(plan.trained) for plan in drawn]), minlength=11)
    torch.testing.assert_close(shares[1:] / len(drawn), torch.full((10,), 0.1), rtol=0, atol=0.02)
    assert {len(plan.trained) for plan in plans(AlignProp(2, 4), 10)} == {2, 3, 4}


def test_refl_trains_its_stop() -> None:
    drawn = plans(ReFL(m=4), 10)
    assert {plan.stop for plan in drawn} == {1, 2, 3, 4}
    assert all(plan.trained == {plan.stop} for plan in drawn)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (DRTune(k=16, m=11), "1 <= k <= 15"),
        (DRTune(m=25), "1 <= m < the sampler's 25 steps"),
        (DRaFT(26), "1 <= k <= the sampler's 25 steps"),
        (AlignProp(3, 2), "1 <= min_steps <= 2"),
        (AlignProp(1, 26), "at most the sampler's 25 steps"),
        (ReFL(m=25), "1 <= m < the sampler's 25 steps"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, GradientMethod) else "",
)
def test_settings_that_do_not_fit_are_refused(method: GradientMethod, named: str) -> None:
    with pytest.raises(UsageError) as raised:
        tuner_of(method, num_steps=25)
    message = str(raised.value)
    assert named in message and type(method).__name__ in message and "sampler.num_steps" in message


def test_a_reward_without_gradient_is_refused() -> None:
    with pytest.raises(UsageError, match="DRTune needs a differentiable reward, but Component"):
        tuner_of(DRTune(), reward=ComponentIndicator())
    parts = WeightedSum({"near": Quadratic(), "mode": ComponentIndicator()})
    with pytest.raises(UsageError, match="WeightedSum's ComponentIndicator has no gradient"):
        tuner_of(DRTune(), reward=parts)


def test_a_discrete_process_is_refused() -> None:
    pipeline = GaussianMixturePipeline()
    pipeline.process = MaskedProcess(4)  # type: ignore[assignment]
    tuner = RewardGradient(pipeline, Quadratic())
    with pytest.raises(UsageError, match=r"MaskedProcess of GaussianMixturePipeline .*/p_graft"):
        tuner.setup("fit")


def test_the_hinge_leaves_good_samples_alone() -> None:
    plain = tuner_of(DRaFT(2))
    losses, values = plain.loss(experience_of(plain), generators(SEEDS))
    ceiling = float(values["reward"].median())
    hinged = tuner_of(DRaFT(2), reward_ceiling=ceiling)
    clipped, _ = hinged.loss(experience_of(hinged), generators(SEEDS))
    torch.testing.assert_close(clipped, (losses + ceiling).clamp(min=0), **EXACT)
    bad = values["reward"] < ceiling
    assert 0 < bad.sum() < SIZE
    kept = gradients((losses * bad).sum(), plain)
    torch.testing.assert_close(gradients((clipped * bad).sum(), hinged), kept, **EXACT)


@pytest.mark.parametrize("method", [DRTune(k=2, m=3), DRaFTLV(2)], ids=["DRTune", "DRaFT-LV"])
def test_the_penalty_is_the_distance_to_the_reference(method: GradientMethod) -> None:
    tuner, plain = tuner_of(method, kl_coef=0.5), tuner_of(method)
    for each in (tuner, plain):
        with torch.no_grad():
            each.pipeline.denoiser.means[:] += 0.1
    pairs: list[Tensor] = []
    reference = tuner.reference.forward

    def compared(x_t: Any, t: Tensor, condition: Any) -> Any:
        prediction = tensor_of(reference(x_t, t, condition))
        pairs.append(tensor_of(tuner.pipeline(x_t, t, condition)).detach() - prediction)
        return prediction

    tuner.reference.forward = compared  # type: ignore[method-assign]
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    unpenalised, _ = plain.loss(experience_of(plain), generators(SEEDS))
    squares = [pair.square().mean(dim=1).view(SIZE, -1).mean(dim=1) for pair in pairs]
    distance = torch.stack(squares).mean(dim=0)
    assert distance.min() > 1e-4
    torch.testing.assert_close(values["reference_distance"].double(), distance, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses, unpenalised + 0.5 * distance, rtol=1e-5, atol=0)


def test_the_penalty_is_that_of_a_free_number() -> None:
    """Empty slots, and the centre that a cloud of points has not, are no dimensions."""
    pipeline = MoleculePipeline("small")
    condition = pipeline.encode({"num_atoms": torch.tensor([4, 9])})
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(generators(range(2)))

    def reference(x_t: Any, t: Tensor, given: Any) -> Tensor:
        return tensor_of(pipeline(x_t, t, given)) + 0.1 * occupied(x_t)

    plan = GradientPlan(frozenset([1]))
    walk = GradientWalk(
        plan,
        condition,
        pipeline,
        Sampler(2),
        reference=reference,
        detach_input=True,
        recompute=False,
    )
    walk.run(x_1, None)
    atoms, columns = torch.tensor([4, 9]), tensor_of(x_1).shape[-1]
    # Positions that all move alike move the centre alone, which no sample has.
    expected = 0.1**2 * atoms * (columns - 3) / (atoms * columns - 3)
    torch.testing.assert_close(walk.distances[0], expected, rtol=1e-4, atol=0)


@each_method
def test_the_penaltys_gradient_takes_the_states_as_given(method: GradientMethod) -> None:
    """Also where the reward's gradient follows the states: a part of it alone fits no loss."""
    tuner, plain = tuner_of(method, kl_coef=0.5), tuner_of(method)
    for each in (tuner, plain):
        with torch.no_grad():
            each.pipeline.denoiser.means[:] += 0.1
    seen: list[tuple[Any, Tensor, Any, Tensor]] = []
    reference = tuner.reference.forward

    def compared(x_t: Any, t: Tensor, condition: Any) -> Any:
        prediction = reference(x_t, t, condition)
        seen.append((x_t, t, condition, tensor_of(prediction)))
        return prediction

    tuner.reference.forward = compared  # type: ignore[method-assign]
    losses, _ = tuner.loss(experience_of(tuner), generators(SEEDS))
    found = gradients(losses.sum(), tuner)
    unpenalised, _ = plain.loss(experience_of(plain), generators(SEEDS))
    distances = torch.stack(
        [
            (tensor_of(plain.pipeline(x_t, t, condition)) - prediction).square().mean(dim=1)
            for x_t, t, condition, prediction in seen
        ]
    )
    copies = distances.shape[1] // SIZE
    penalty = 0.5 * distances.sum() / (len(seen) * copies)
    expected = gradients(unpenalised.sum() + penalty, plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_reference_does_not_run_without_a_penalty() -> None:
    tuner = tuner_of(DRTune(k=2, m=3))
    assert tuner.reference is not None and tuner.reference.frozen is not None
    tuner.reference.frozen.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    tuner.loss(experience_of(tuner), generators(SEEDS))


@each_method
def test_the_pull_on_each_step_is_its_gradient(method: GradientMethod) -> None:
    tuner = tuner_of(method, log_depth=True)
    found: list[tuple[Tensor, Tensor]] = []
    policy = tuner.pipeline.forward

    def kept(x_t: Any, t: Tensor, condition: Any) -> Any:
        prediction = tensor_of(policy(x_t, t, condition))
        if prediction.requires_grad:
            prediction.retain_grad()
            found.append((t, prediction))
        return prediction

    tuner.pipeline.forward = kept  # type: ignore[method-assign]
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    (losses.sum() * 64).backward()  # as a gradient scaler would
    logged = {int(name.rpartition("/")[2]): v for name, v in values.items() if "grad_norm" in name}
    times = tuner.pipeline.process.times(T)
    expected = {}
    for t, prediction in found:
        step = T - int((times - t[0]).abs().argmin())
        assert prediction.grad is not None
        expected[step] = prediction.grad.reshape(SIZE, -1).norm(dim=1) / 64
    assert logged.keys() == expected.keys()
    for step, norm in expected.items():
        torch.testing.assert_close(logged[step], norm, rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def tiny(tiny_stable_diffusion: Callable[..., Path]) -> Callable[..., RewardGradient]:
    """Return a function that makes a tuner of a tiny diffusion model whose adapter is not zero."""

    def make(method: GradientMethod | None = None, **settings: Any) -> RewardGradient:
        keys = ("guidance_scale", "guidance_gradient", "checkpoint_decoder", "decode_batch_size")
        given = {key: settings.pop(key) for key in keys if key in settings}
        pipeline = TextToImagePipeline(
            str(tiny_stable_diffusion()), **{"guidance_scale": 3.0} | given
        )
        method = method or DRTune(k=2, m=2)
        tuner = RewardGradient(
            pipeline, Symmetry(), method=method, lora=LoRA(2), sampler=Sampler(4), **settings
        )
        tuner.setup("fit")
        torch.manual_seed(0)
        for name, parameter in tuner.trainable().named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return tuner

    return make


def pictured(tuner: RewardGradient, size: int = 3) -> tuple[Tensor, list[Tensor]]:
    prompts = ["a red circle", "a blue ring", "a red circle"][:size]
    batch = {"index": torch.arange(size), "prompt": prompts}
    experience = Experience({}, tuner.pipeline.encode(batch), list(range(size)))
    losses, _ = tuner.loss(experience, generators(range(size)))
    return losses.detach(), gradients(losses.sum(), tuner)


@pytest.mark.parametrize("checkpointing", ["steps", "blocks"])
def test_checkpointing_does_not_change_gradients(
    tiny: Callable[..., RewardGradient], checkpointing: str
) -> None:
    losses, expected = pictured(tiny(checkpoint_decoder=False))
    cheap = tiny(gradient_checkpointing=checkpointing, decode_batch_size=2)
    again, found = pictured(cheap)
    assert max(float(g.abs().max()) for g in expected) > 1e-6
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_the_unconditional_half_can_be_detached(tiny: Callable[..., RewardGradient]) -> None:
    whole, conditional = tiny(), tiny(guidance_gradient="conditional")
    assert isinstance(whole.pipeline, TextToImagePipeline)
    pipeline = whole.pipeline
    scale = pipeline.guidance_scale

    def by_hand(x_t: Any, t: Tensor, condition: Any) -> Any:
        null = condition.dropped(torch.ones_like(condition.rows, dtype=torch.bool))
        u = pipeline.predict(x_t, t, null).detach()
        return u + scale * (pipeline.predict(x_t, t, condition) - u)

    losses, both = pictured(whole)
    whole.pipeline.forward = by_hand  # type: ignore[method-assign]
    _, expected = pictured(whole)
    found_losses, found = pictured(conditional)
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    largest = max(float((g - h).abs().max()) for g, h in zip(both, expected, strict=True))
    assert largest > 1e-5


@pytest.mark.parametrize("method", [DRTune(k=2, m=2), DRaFT(2)], ids=["DRTune", "DRaFT-2"])
def test_autocast_keeps_the_gradient(
    tiny: Callable[..., RewardGradient], method: GradientMethod
) -> None:
    """Weights that autocast cast for a step without graph must not serve one with a graph."""
    _, expected = pictured(tiny(method))
    with torch.autocast("cpu", torch.bfloat16):
        _, found = pictured(tiny(method))
    flat, other = (torch.cat([g.flatten() for g in each]) for each in (expected, found))
    assert torch.nn.functional.cosine_similarity(flat, other, dim=0) > 0.95
    assert 0.7 < float(other.norm() / flat.norm()) < 1.4


@pytest.mark.parametrize(
    "method",
    [DRTune(2, 4), DRaFT(1), DRaFTLV(2), AlignProp(), ReFL(3)],
    ids=["DRTune", "DRaFT-1", "DRaFT-LV", "AlignProp", "ReFL"],
)
def test_every_method_reaches_the_optimum_of_a_quadratic_reward(method: GradientMethod) -> None:
    """The optimum is known: every sample at the centre, where the reward is 0."""
    tuner = tuner_of(method, num_steps=10, seed=1)
    optimizer = torch.optim.Adam(tuner.trainable().parameters(), lr=5e-3)
    means = []
    for update in range(150):
        tuner.num_updates = update
        seeds = range(32 * update, 32 * (update + 1))
        losses, values = tuner.loss(experience_of(tuner, 32), generators(seeds))
        optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        means.append(float(values["reward"].mean()))
    with torch.no_grad():
        condition = experience_of(tuner, 256).condition
        noise = generators(range(256))
        x_1 = tuner.prior(condition).sample(noise)
        x_0 = tuner.sampler.sample(tuner.pipeline, tuner.pipeline.process, x_1, condition)
        reached = float(tuner.reward(x_0, condition).mean())
    assert means[0] < -2.0 and reached > -0.1


@pytest.mark.parametrize(
    "method",
    [DRaFT(1), DRaFT(2), DRaFTLV(2), AlignProp(1, 1), DRTune(k=1, m=1), ReFL(m=1)],
    ids=["DRaFT-1", "DRaFT-2", "DRaFT-LV", "AlignProp", "DRTune", "ReFL"],
)
def test_a_last_step_that_moves_nothing_is_not_one_of_those_trained(method: GradientMethod) -> None:
    """Schedulers without an offset end at the level at which their last step begins."""
    still = DiscreteVP(vp_betas(), steps_offset=0, ends_at_zero=False)
    assert abs(float(still.times(T)[-2] - still.ends(T)[-1])) < 1e-9
    tuner = tuner_of(method, prediction_type="v", log_depth=True)
    tuner.pipeline.process = GaussianProcess(still, "v")
    losses, values = tuner.loss(experience_of(tuner), generators(SEEDS))
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    assert max(float(g.abs().max()) for g in grads if g is not None) > 1e-4
    trained = {name for name in values if name.startswith("grad_norm_at_step")}
    assert trained and "grad_norm_at_step/001" not in trained
    assert all(float(values[name].abs().max()) > 0 for name in trained)


def test_a_plan_before_a_still_step_is_the_same_one_step_earlier() -> None:
    """ReFL's stop is then the step that it trains, not the one that moves nothing."""
    plan = GradientPlan(frozenset([1, 3]), stop=1, num_copies=2)
    assert plan.before(1) == GradientPlan(frozenset([2, 4]), stop=2, num_copies=2)
    assert DRaFT(1).draw(T, torch.Generator()).before(1) == GradientPlan(frozenset([2]))


def test_as_many_steps_can_be_trained_as_move() -> None:
    tuner = tuner_of(DRaFT(T))
    tuner.check()
    still = DiscreteVP(vp_betas(), steps_offset=0, ends_at_zero=False)
    tuner.pipeline.process = GaussianProcess(still, "v")
    with pytest.raises(UsageError, match=f"1 <= k <= the sampler's {T - 1} steps"):
        tuner.check()


@pytest.mark.parametrize("method", [DRaFT(4), AlignProp(4, 4)], ids=["DRaFT", "AlignProp"])
def test_saving_memory_changes_no_cost(method: GradientMethod) -> None:
    spent = []
    for how in (None, "steps"):
        tuner = tuner_of(method, gradient_checkpointing=how)
        losses, _ = tuner.loss(experience_of(tuner), generators(SEEDS))
        losses.sum().backward()
        cost = tuner.meter.training
        spent.append((cost.denoiser_calls, cost.flops, cost.backward_flops))
    assert spent[0] == spent[1] and spent[0][0] == T * SIZE and min(spent[0]) > 0
