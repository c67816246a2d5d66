"""Relays: who runs which steps, at which levels is trained, and walks that are equal bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Quadratic
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.nft import DiffusionNFT
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import AlignProp, DRaFT, ReFL
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, vp_betas
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.relay import Relay

PROCESSES: dict[str, Process] = {
    "discrete": GaussianProcess(DiscreteVP(vp_betas()), "epsilon"),
    "cosine": GaussianProcess(CosineVP(), "v"),
    "flow": GaussianProcess(RectifiedFlow(), "velocity"),
    "shifted": GaussianProcess(RectifiedFlow(3.0, (0.0, 1.0)), "velocity"),
    "masked": MaskedProcess(3),
}


@pytest.mark.parametrize(
    ("start", "cut", "num_steps", "steps"),
    [
        (0.0, 0.25, 20, (0, 15)),
        (0.25, 0.0, 25, (6, 25)),
        (0.0, 0.25, 2, (0, 1)),  # not no cut at all
        (0.01, 0.05, 10, (1, 9)),
        (0.0, 0.0, 3, (0, 3)),
    ],
)
def test_a_share_is_a_step_at_least(
    start: float, cut: float, num_steps: int, steps: tuple[int, int]
) -> None:
    assert Relay(start, cut).steps(num_steps) == steps


def test_x_tau_lies_where_the_last_tuned_step_leads() -> None:
    """Schedulers with fixed strides step past their own grid: the next label is another level."""
    process = GaussianProcess(DiscreteVP(vp_betas(), spacing="linspace", strides=True), "epsilon")
    low, high = Relay(cut=0.25).levels(process, 10)
    assert (low, high) == (float(process.ends(10)[7]), 1.0)
    assert low == pytest.approx(0.123) and float(process.times(10)[8]) == pytest.approx(0.112)


@pytest.mark.parametrize("name", PROCESSES)
def test_training_levels_are_the_native_ones_between_the_ends(name: str) -> None:
    """Kolmogorov-Smirnov: as drawn above the cut, where those above the start are thrown away."""
    process, relay = PROCESSES[name], Relay(start=0.3, cut=0.2)
    low, high = relay.levels(process, 10)
    times = process.times(10)
    assert (low, high) == (float(times[8]), float(times[3]))
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    found = relay.draw_times(process, 10, uniform).sort().values
    native = process.draw_times(uniform, low=low)
    kept = native[native <= high].sort().values
    assert low < float(found.min()) and float(found.max()) <= high
    # On a grid of levels the share of each; else the quantiles.
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1]
    levels = low + grid * (high - low)
    cdf = [torch.searchsorted(own, levels, right=True).double() / len(own) for own in (found, kept)]
    assert (cdf[0] - cdf[1]).abs().max() < 2e-3
    none = Relay(cut=0.2)
    assert torch.equal(none.draw_times(process, 10, uniform), native)


def test_training_levels_follow_a_schedule_that_is_changed() -> None:
    relay, uniform = Relay(start=0.25), torch.linspace(0, 0.99, 9)
    process, fresh = (GaussianProcess(RectifiedFlow(), "velocity") for _ in range(2))
    before = relay.draw_times(process, 8, uniform)
    for own in (process, fresh):
        assert isinstance(own.schedule, RectifiedFlow)
        own.schedule.logit_normal = (0.0, 0.5)
    after = relay.draw_times(process, 8, uniform)
    assert torch.equal(after, relay.draw_times(fresh, 8, uniform))
    assert not torch.equal(after, before) and after.max() <= 0.75


def tuner_of(kind: type[RewardFineTuner], num_steps: int = 5, **settings: Any) -> RewardFineTuner:
    """Return a tuner whose LoRA is far from zero."""
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    sampler = Sampler(num_steps, settings.pop("eta", 0.0))
    tuner = kind(pipeline, Quadratic(), sampler=sampler, lora=LoRA(rank=2, alpha=2), **settings)
    tuner.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for parameter in tuner._trained().values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return tuner


KINDS: dict[str, tuple[type[RewardFineTuner], dict[str, Any]]] = {
    "p_graft": (PGRAFT, {"start": 0.4, "cut": 0.2}),
    "nft": (DiffusionNFT, {"start": 0.4, "cut": 0.2}),
    "dpo": (DiffusionDPO, {"start": 0.4, "cut": 0.2}),
    "refl": (RewardGradient, {"start": 0.4, "method": ReFL(m=2)}),
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_the_reference_runs_the_first_steps_bit_by_bit(name: str, eta: float) -> None:
    kind, settings = KINDS[name]
    tuner = tuner_of(kind, eta=eta, **settings)
    condition = tuner.pipeline.encode({"index": torch.arange(6)})

    def walk(route: Any) -> list[Tensor]:
        with torch.no_grad():
            return [tensor_of(x) for _, x in route.walk(condition, generators(range(6)))]

    own, reference = walk(tuner.route()), walk(tuner.reference_route())
    same = [torch.equal(a, b) for a, b in zip(own, reference, strict=True)]
    assert same == [True, True, True, False, False, False]
    last = 1 if name != "refl" else 0
    assert tuner.route().tuned_steps.tolist() == [False] * 2 + [True] * (3 - last) + [False] * last


def test_the_divergence_of_a_relay_is_that_of_its_tuned_steps() -> None:
    """Each sample estimates it from one of all steps: 0 where the reference runs that one."""
    tuner = tuner_of(PGRAFT, eta=1.0, cut=0.6)
    condition, seeds = tuner.pipeline.encode({"index": torch.arange(400)}), range(400)
    x_0, routes = torch.zeros(400, 2), (tuner.route(), tuner.reference_route())
    assert routes[0].tuned_steps.tolist() == [True] * 2 + [False] * 3
    with torch.no_grad():
        found = tuner.evaluator._divergence(x_0, condition, seeds, *routes)
    share = float((found > 0).double().mean())
    assert share == pytest.approx(2 / 5, abs=3 * (0.4 * 0.6 / 400) ** 0.5)


def test_image_refl_trains_the_steps_after_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of a walk by hand, whose first steps the reference runs."""
    tuner = tuner_of(RewardGradient, start=0.4, method=ReFL(m=2))
    condition = tuner.pipeline.encode({"index": torch.arange(4)})
    from lit_rlft.loop.experience import Experience

    losses, _ = tuner.loss(Experience({}, condition, [1, 2, 3, 4]), generators([1, 2, 3, 4]))
    trained = list(tuner._trained().values())
    found = torch.autograd.grad(losses.sum(), trained)
    plan = tuner.draw_plan()  # type: ignore[attr-defined]
    assert plan.stop is not None and 1 <= plan.stop <= 2
    process, stop = tuner.pipeline.process, 5 - plan.stop
    times = process.times(5)
    with torch.no_grad():
        x = tuner.prior(condition).sample(generators([1, 2, 3, 4]))
        for i in range(stop):
            t, s = (level.expand(4) for level in times[i : i + 2])
            predict = tuner.reference if i < 2 else tuner.pipeline
            x = process.transition(predict(x, t, condition), x, t, s, eta=0.0).mean
    t = times[stop].expand(4)
    x_0 = process.denoised(tuner.pipeline(x, t, condition), x, t)
    wanted = torch.autograd.grad(-tuner.reward(x_0, condition).sum(), trained)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_that_the_reference_runs_first_are_never_trained() -> None:
    tuner, drawn = tuner_of(RewardGradient, start=0.4, method=AlignProp()), set()
    for tuner.num_updates in range(20):
        drawn |= tuner.draw_plan().trained  # type: ignore[attr-defined]
    assert drawn == {1, 2, 3}
    with pytest.raises(UsageError, match="1 <= k <= the sampler's 3 steps"):
        tuner_of(RewardGradient, start=0.4, method=DRaFT(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 1.0}, r"start must be in \[0, 1\)"),
        ({"start": 0.95}, "start must be smaller"),
        ({"cut": 0.95}, "cut must be smaller"),
        ({"start": 0.6, "cut": 0.6}, "start must be smaller"),
    ],
)
@pytest.mark.parametrize("kind", [PGRAFT, DiffusionNFT, DiffusionDPO])
def test_shares_must_leave_a_step(
    kind: type[RewardFineTuner], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tuner_of(kind, **settings)
