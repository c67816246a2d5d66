"""Flow-GRPO's equation, coefficients-preserving steps, and noise in a window of steps alone."""

import math
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import (
    CPS,
    AngularFlow,
    FlowSDE,
    GaussianProcess,
    MaskedProcess,
    Noise,
    ProductProcess,
    Within,
)
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler, Transition, walk
from lit_rlft.core.schedule import CosineVP, DiscreteVP, PolynomialVP, RectifiedFlow, vp_betas
from lit_rlft.core.state import State, tensor_of
from lit_rlft.core.subspace import PointClouds
from lit_rlft.core.trajectory import walk_with_log_probs
from lit_rlft.core.window import SlidingWindow
from lit_rlft.loop.route import noise_told

FLOW = GaussianProcess(RectifiedFlow(), "velocity")
PROCESSES: dict[str, GaussianProcess] = {
    "flow": FLOW,
    "shifted": GaussianProcess(RectifiedFlow(shift=3.0), "velocity"),
    "sample": GaussianProcess(RectifiedFlow(), "sample"),
    "discrete VP": GaussianProcess(DiscreteVP(vp_betas()), "epsilon"),
    "discrete VP, v": GaussianProcess(DiscreteVP(vp_betas(), ends_at_zero=False), "v"),
    "cosine VP": GaussianProcess(CosineVP(), "v"),
    "cosine VP with some signal": GaussianProcess(CosineVP(min_alpha=2e-3), "epsilon"),
    "polynomial VP": GaussianProcess(PolynomialVP(), "epsilon"),
    "arcs": AngularFlow(),
}
A, MEAN, STD = 0.7, 1.0, 0.5


def conditions(num: int) -> Condition:
    return Condition([{}], {}, torch.zeros(num, dtype=torch.int64))


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(x: float, v: float, z: float, t: float, s: float) -> float:
    """The published step, with plain floats; 1 - t is that of s in steps of more than twice it."""
    sig = A * math.sqrt(t / (1 - (s if t - s > 2 * (1 - t) else t)))
    drift = v + sig**2 / (2 * t) * (x + (1 - t) * v)
    return x - drift * (t - s) + (sig * math.sqrt(t - s) * z if s else 0.0)


@pytest.mark.parametrize("times", [FLOW.times(2), FLOW.times(10), column(0.9, 0.75, 0.2)], ids=len)
def test_the_step_is_the_published_one(times: Tensor) -> None:
    for t, s in pairwise(times.tolist()):
        for x, v, z in ((0.3, -1.2, 0.4), (-2.0, 0.7, -1.1)):
            args = (column(v).view(1, 1), column(x).view(1, 1))
            law: Any = FLOW.step(*args, FLOW.flow_sde(column(t), column(s), A))
            found = float(law.loc + law.std * z)
            assert found == pytest.approx(by_hand(x, v, z, t, s), rel=1e-12)


def exact(process: GaussianProcess, x: Tensor, t: Tensor) -> Tensor:
    """The prediction for data N(MEAN, STD^2)."""
    alpha, sigma = (level.unsqueeze(1) for level in process.schedule.levels(t))
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x_0 = MEAN + gain * (x - alpha * MEAN)
    return process.prediction(x_0, (x - alpha * x_0) / sigma, t)


def final(process: GaussianProcess, num_steps: int, noise: Noise) -> tuple[float, float]:
    """Mean and std of x_0 without sampling: each step of the exact model is linear in x."""
    times, ends = process.times(num_steps), process.ends(num_steps)
    table = process.steps(times, ends, noise, torch.zeros(1, dtype=torch.float64))
    alpha, sigma = (float(level) for level in process.schedule.levels(times[0]))
    mean, variance = alpha * MEAN, (alpha * STD) ** 2 + sigma**2
    for i in range(num_steps):
        x, t = column(0.0, 1.0).unsqueeze(1), times[i].expand(2)
        law: Any = process.step(exact(process, x, t), x, table.row(i))
        start, slope = float(law.loc[0]), float(law.loc[1] - law.loc[0])
        mean = start + slope * mean
        variance = slope**2 * variance + float(law.std.reshape(-1)[0]) ** 2
    return mean, math.sqrt(variance)


LISTED = {
    "flow_sde": {10: 0.4746, 20: 0.4906, 40: 0.4976, 200: 0.5011},
    "cps": {10: 0.3703, 20: 0.3945, 40: 0.4069, 200: 0.4201},
    "eta": {10: 0.4134, 20: 0.4508, 40: 0.4725, 200: 0.4936},
}
"""Standard deviations of 400,000 samples, of standard error 0.0006."""


@pytest.mark.parametrize("transition", LISTED)
def test_marginals_are_those_listed(transition: Any) -> None:
    for num_steps, std in LISTED[transition].items():
        found = final(FLOW, num_steps, Sampler(num_steps, A, transition).noise)
        assert found[0] == pytest.approx(MEAN, abs=1e-9)
        assert found[1] == pytest.approx(std, abs=0.0015)


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, A) for name in PROCESSES), ("shifted", math.sqrt(2))]
)
def test_marginals_are_the_datas_on_every_schedule(name: str, scale: float) -> None:
    """Also from levels next to pure noise; the remaining error falls with the steps."""
    process = PROCESSES[name]
    coarse, fine = (final(process, num, FlowSDE(scale)) for num in (25, 200))
    # The level in place of data is noisy on the schedule that ends there.
    assert fine[0] == pytest.approx(MEAN, abs=0.01) and fine[1] == pytest.approx(STD, abs=0.01)
    assert coarse[1] == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_no_level_has_more_noise_than_the_forward_process(name: str, scale: float) -> None:
    """Of data that are one point the states of every level are N(alpha m, sigma^2)."""
    process = PROCESSES[name]
    times, ends = process.times(12), process.ends(12)
    levels = [
        tuple(map(float, process.schedule.levels(t))) for t in (times[0], *ends.to(times).unbind())
    ]
    (alpha, sigma), variance = levels[0], levels[0][1] ** 2
    mean = alpha * MEAN
    table = process.steps(times, ends, CPS(scale), torch.zeros(1, dtype=torch.float64))
    for i, (alpha_s, sigma_s) in enumerate(levels[1:]):
        x, t = column(0.0, 1.0).unsqueeze(1), times[i].expand(2)
        alpha, sigma = map(float, process.schedule.levels(times[i]))
        x_0 = torch.full_like(x, MEAN)
        p = process.prediction(x_0, (x - alpha * MEAN) / sigma, t)
        law: Any = process.step(p, x, table.row(i))
        start, slope, std = float(law.loc[0]), float(law.loc[1] - law.loc[0]), law.std.reshape(-1)
        mean, variance = start + slope * mean, slope**2 * variance + float(std[0]) ** 2
        assert mean == pytest.approx(alpha_s * MEAN, abs=1e-9)
        assert variance == pytest.approx(sigma_s**2, abs=1e-9)
        assert float(std[0]) == pytest.approx(sigma_s * math.sin(math.pi / 2 * scale), abs=1e-9)


def test_the_preserving_step_is_the_published_one() -> None:
    t, s = column(1.0, 0.6, 0.3), column(0.8, 0.5, 0.0)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law: Any = FLOW.step(v, x, FLOW.cps(t, s, 0.8))
    for i in range(3):
        level, std = float(s[i]), float(s[i]) * math.sin(0.8 * math.pi / 2)
        data, noise = x[i] - t[i] * v[i], x[i] + (1 - t[i]) * v[i]
        mean = (1 - level) * data + math.sqrt(level**2 - std**2) * noise
        torch.testing.assert_close(law.loc[i], mean)
        assert float(law.std.reshape(-1)[i]) == pytest.approx(std)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_step_is_that_of_the_equivalent_flow(name: str) -> None:
    """In y = x / (alpha + sigma) and tau = sigma / (alpha + sigma)."""
    process, torch_seed = PROCESSES[name], torch.Generator().manual_seed(0)
    t, s = column(0.9, 0.5, 0.2), column(0.8, 0.45, 0.0)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = process.schedule.levels(torch.stack([t, s]))
    size_t, size_s = alpha_t + sigma_t, alpha_s + sigma_s
    x_0, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch_seed)
    x = alpha_t.unsqueeze(1) * x_0 + sigma_t.unsqueeze(1) * eps
    law: Any = process.step(process.prediction(x_0, eps, t), x, process.flow_sde(t, s, A))
    y = x / size_t.unsqueeze(1)
    for i in range(3):
        for j in range(4):
            args = (float(eps[i, j] - x_0[i, j]), 0.0, float(sigma_t[i] / size_t[i]))
            mean = by_hand(float(y[i, j]), *args, float(sigma_s[i] / size_s[i]))
            assert float(law.loc[i, j] / size_s[i]) == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert float(law.std[2]) == 0


def test_log_probabilities_and_kl_are_those_of_torch_distributions() -> None:
    t, s = column(1.0, 0.6, 0.3), column(0.8, 0.5, 0.1)
    x, first, second, target = torch.randn(4, 3, 5, dtype=torch.float64)
    laws: list[Any] = [FLOW.step(p, x, FLOW.flow_sde(t, s, A)) for p in (first, second)]
    ours, theirs = (Normal(law.loc, law.std.expand_as(law.loc)) for law in laws)
    torch.testing.assert_close(laws[0].log_prob(target), ours.log_prob(target).sum(dim=1))
    torch.testing.assert_close(laws[0].kl(laws[1]), kl_divergence(ours, theirs).sum(dim=1))
    # With equal stds the KL is the squared distance of the means: |of_p (p - q)|^2 / (2 std^2).
    sig = A * (t / (1 - t.where(t < 1, s))).sqrt()
    of_p = (t - s) * (1 + sig**2 * (1 - t) / (2 * t))
    distance = (of_p.unsqueeze(1) * (first - second)).square().sum(dim=1)
    torch.testing.assert_close(laws[0].kl(laws[1]), distance / (2 * sig**2 * (t - s)))


@pytest.mark.parametrize("noise", [FlowSDE(A), CPS(A)])
def test_point_clouds_stay_centred(noise: Any) -> None:
    process = GaussianProcess(RectifiedFlow(), "velocity", PointClouds(3))
    x, p = torch.randn(2, 2, 4, 3)
    law = process.step(p, x, process.flow_coefficients(column(0.9, 0.5), column(0.8, 0.3), noise))
    assert tensor_of(law.sample()).mean(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize("noise", [FlowSDE(A), CPS(A), CPS(1.0)])
def test_clipped_steps_go_on_from_the_clipped_estimate(noise: Any) -> None:
    """Within the limit they are the free ones; beyond it, those of the clipped data."""
    schedule, t, s = DiscreteVP(vp_betas()), column(0.9, 0.5), column(0.8, 0.3)
    free, clipped = (
        GaussianProcess(schedule),
        GaussianProcess(schedule, bound=lambda x: x.clamp(-1, 1)),
    )
    eps, x_0 = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[0.3, -0.9, 4.0]]).double()
    alpha, sigma = (level.unsqueeze(1) for level in schedule.levels(t))
    laws: list[Any] = [
        process.step(eps, alpha * data + sigma * eps, process.flow_coefficients(t, s, noise))
        for process, data in ((clipped, x_0), (free, x_0.clamp(-1, 1)))
    ]
    torch.testing.assert_close(laws[0].loc, laws[1].loc)
    torch.testing.assert_close(laws[0].std.flatten(), laws[1].std.flatten())


def network(x: State, t: Tensor, condition: Condition) -> Tensor:
    return torch.tanh(tensor_of(x).roll(1, dims=1)) * t.unsqueeze(1).float()


@pytest.mark.parametrize("process", [FLOW, PROCESSES["discrete VP"], PROCESSES["arcs"]], ids=str)
@pytest.mark.parametrize("noise", [FlowSDE(A), CPS(A), 1.0])
def test_steps_outside_the_window_are_the_odes_bit_by_bit(
    process: GaussianProcess, noise: Any
) -> None:
    num, first, last = 6, 2, 4
    x_1, times = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), process.times(num)
    grid = (times, Within(noise, first, last))
    steps = [
        *walk_with_log_probs(network, process, x_1, conditions(5), *grid, generators(range(5)))
    ]
    free = [x for _, x in walk(network, process, x_1, conditions(5), times, 0.0)]
    for i in range(num + 1):
        assert torch.equal(tensor_of(steps[i][0]), tensor_of(free[i])) == (i <= first)
    again = walk(network, process, steps[last][0], conditions(5), times[last:], 0.0)
    for i, x in again:
        assert torch.equal(tensor_of(x), tensor_of(steps[last + i][0]))
    for i, (_, log_prob) in enumerate(steps[1:]):
        assert log_prob is not None and bool(log_prob.all()) == (first <= i < last)
    plain = walk(network, process, x_1, conditions(5), *grid, generators(range(5)))
    assert all(torch.equal(tensor_of(x), tensor_of(steps[i][0])) for i, x in plain)


def test_a_window_over_everything_is_no_window() -> None:
    x_1, times = torch.randn(4, 3), FLOW.times(5)
    whole, free = (
        [*walk(network, FLOW, x_1, conditions(4), times, noise, generators(range(4)))]
        for noise in (Within(FlowSDE(A), 0, 5), FlowSDE(A))
    )
    for (_, a), (_, b) in zip(whole, free, strict=True):
        assert torch.equal(tensor_of(a), tensor_of(b))


def test_the_window_slides_and_stays_at_the_end() -> None:
    window = SlidingWindow(size=4, interval=25)
    assert [window.at(i, 25) for i in (0, 24, 25, 50)] == [(0, 4), (0, 4), (1, 5), (2, 6)]
    assert {window.at(i, 25) for i in (500, 10**6)} == {(20, 24)}
    fast = SlidingWindow(size=1, interval=1, stride=2)
    assert [fast.at(i, 4)[0] for i in range(4)] == [0, 2, 2, 2]


def test_a_random_window_is_drawn_anew_within_its_share_of_the_steps() -> None:
    window = SlidingWindow(size=2, interval=3, order="random", until=0.5)
    drawn = [window.at(i, 10, seed=7) for i in range(3000)]
    assert drawn[::3] == drawn[1::3] == drawn[2::3]
    assert drawn == [window.at(i, 10, seed=7) for i in range(3000)]
    assert drawn != [window.at(i, 10, seed=8) for i in range(3000)]
    firsts = [first for first, last in drawn[::3] if last == first + 2]
    counts = [firsts.count(first) for first in range(4)]
    assert sum(counts) == 1000
    assert all(abs(count - 250) < 4 * math.sqrt(1000 * 3 / 16) for count in counts)
    whole = SlidingWindow(size=2, interval=1, order="random")
    assert {whole.at(i, 4)[0] for i in range(100)} == {0, 1}  # never the last step
    assert SlidingWindow(size=2, until=0.5).at(10**6, 10) == (3, 5)


def test_a_window_stays_within_its_share_and_says_what_share_it_needs() -> None:
    """Half of 7 steps are 3, as published; what the sentence asks for is enough."""
    halves = {num: SlidingWindow(until=0.5).most(num) for num in (2, 3, 5, 6, 7, 10, 11)}
    assert halves == {2: 1, 3: 1, 5: 2, 6: 3, 7: 3, 10: 5, 11: 5}
    assert SlidingWindow(until=0.29).most(100) == 29 and SlidingWindow().most(7) == 6
    for num in (2, 3, 7, 30, 300):
        for size in range(1, num):
            with pytest.raises(UsageError, match="until must be at least") as caught:
                SlidingWindow(size, until=0.0).check(num)
            share = float(str(caught.value).split("at least ")[1].split(",")[0])
            enough = SlidingWindow(size, order="random", until=share)
            enough.check(num)
            assert enough.most(num) == size and enough.at(0, num)[1] <= size
            assert share < size / num + 1e-4


def test_kinds_of_noise_have_tables_of_their_own() -> None:
    x, times = torch.zeros(1), FLOW.times(4)
    kinds: list[Noise] = [A, FlowSDE(A), CPS(A), Within(A, 0, 2), Within(FlowSDE(A), 0, 2)]
    tables = [tensor_of(FLOW.steps(times, None, kind, x).coefficients) for kind in kinds]
    distinct = {tuple(np.asarray(table).ravel().tolist()) for table in tables}
    assert len(distinct) == len(kinds)


def test_mixed_states_take_the_equation_where_they_have_it() -> None:
    masked = MaskedProcess(3)
    process = ProductProcess({"box": FLOW, "kind": masked})
    t, s = column(0.6), column(0.4)
    assert process.has_flow_steps and not ProductProcess({"kind": masked}).has_flow_steps
    for noise, own in ((FlowSDE(A), FLOW.flow_sde(t, s, A)), (CPS(A), FLOW.cps(t, s, A))):
        found: Any = process.noisy_coefficients(t, s, noise)
        assert torch.equal(found["box"], own)
        assert torch.equal(found["kind"], masked.coefficients(t, s, 1.0))
        kind = type(noise).__name__
        with pytest.raises(
            UsageError, match=f"MaskedProcess has no steps of type {kind}; set .*to eta"
        ):
            masked.noisy_coefficients(t, s, noise)


def test_samplers_say_what_is_possible() -> None:
    assert Sampler(4, 0.7).noise == 0.7 and Sampler(4, 0.7, "flow_sde").noise == FlowSDE(0.7)
    assert Sampler(4, 0.0, "flow_sde").noise == Sampler(4, 0.0, "cps").noise == 0.0
    assert Sampler(4, 0.8, "cps").noise == CPS(0.8)
    assert Sampler(4, math.sqrt(2), "flow_sde").noise == FlowSDE(math.sqrt(2))
    for transition in get_args(Transition):
        told = noise_told(Sampler(4, 0.8, transition).noise)
        assert told == {"eta": 0.8, "transition": transition}
    unknown: Any = "sde"
    for settings, sentence in (
        ((4, 1.5), r"eta must be in \[0, 1\]"),
        ((4, 2.5, "flow_sde"), r"eta must be in \[0, 2\]"),
        ((4, 1.5, "cps"), r"eta must be in \[0, 1\]"),
        ((4, 1.0, unknown), "transition is .*; use 'eta', 'flow_sde' or 'cps'"),
    ):
        with pytest.raises(UsageError, match=sentence):
            Sampler(*settings)
