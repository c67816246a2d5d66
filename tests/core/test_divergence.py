"""The KL of two models' paths against sums of normal and categorical divergences."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lit_rlft.core.divergence import path_kl, prediction_distance
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process, ProductProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, Schedule, vp_betas
from lit_rlft.core.state import State, tensor_of
from lit_rlft.core.subspace import PointClouds

N, B, D = 6, 4000, 3
SCHEDULES = [CosineVP(), RectifiedFlow(), DiscreteVP(vp_betas(), ends_at_zero=False)]


def condition_of(size: int) -> Condition:
    return Condition([{}], {}, torch.zeros(size, dtype=torch.int64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_gaussian_paths_add_the_kl_of_every_step(schedule: Schedule) -> None:
    """A prediction that is off by a constant: the KL of a step does not depend on where it is."""
    process = GaussianProcess(schedule, "v")
    times = process.times(N)

    def reference(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * tensor_of(x_t)

    def policy(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * tensor_of(x_t) + 0.2

    tuned = torch.tensor([True] * (N - 2) + [False, True])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        x = torch.ones(1, D, dtype=torch.float64)
        t, s = times[i].expand(1), times[i + 1].expand(1)
        one, other = (
            process.transition(f(x, t, condition_of(1)), x, t, s, 1.0) for f in (policy, reference)
        )
        if tuned[i] and bool(one.std.max() > 0):
            normal = (Normal(each.loc, each.std) for each in (one, other))
            total = total + kl_divergence(*normal).sum()
    x_0 = torch.zeros(B, D, dtype=torch.float64)
    noise = generators(range(B))
    kl = path_kl(process, policy, reference, x_0, condition_of(B), times, tuned, noise)
    assert total > 0.01
    assert abs(kl.mean() - total) < 4 * kl.std() / B**0.5


def test_paths_follow_the_steps_of_a_coarse_table() -> None:
    """Steps that lead past the grid, from data that carry noise themselves, against a sum by hand.

    Predictions differ by c x_t, so that the KL of a step is D (f c)^2 E[x_t^2] / (2 std^2) with f
    what its mean moves with the prediction.
    """
    bars = 0.7 ** torch.arange(9.0, dtype=torch.float64)  # of the levels k / 8
    betas = torch.full((8,), 0.3, dtype=torch.float64)
    schedule = DiscreteVP(betas, spacing="linspace", ends_at_zero=False, strides=True)
    process, value, c = GaussianProcess(schedule, "v"), 3.0, 0.2
    times, ends = process.times(3), process.ends(3)
    assert (8 * times).tolist() == [8, 5, 1, 1] and (8 * ends).tolist() == [6, 3, 1]
    total = 0.0
    for k, j in ((8, 6), (5, 3)):  # the last step stays where it is
        t, s, start = (float(bars[i]) for i in (k, j, 1))
        std = ((1 - s) / (1 - t) * (1 - t / s)) ** 0.5
        f = (1 - s - std**2) ** 0.5 * t**0.5 - (s * (1 - t)) ** 0.5
        square = t / start * value**2 + 1 - t / start
        total += D * (f * c) ** 2 * square / (2 * std**2)

    def reference(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * tensor_of(x_t)

    def policy(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return (0.3 + c) * tensor_of(x_t)

    x_0 = torch.full((B, D), value, dtype=torch.float64)
    models = (policy, reference, x_0, condition_of(B), times, torch.ones(3, dtype=torch.bool))
    kl = path_kl(process, *models, generators(range(B)), ends)
    assert abs(kl.mean() - total) < 4 * kl.std() / B**0.5 < 0.1 * total


def test_equal_models_have_no_divergence() -> None:
    process = GaussianProcess(RectifiedFlow(), "velocity")

    def policy(x_t: State, t: Tensor, condition: Condition) -> State:
        return x_t

    tuned = torch.ones(N, dtype=torch.bool)
    x_0, times = torch.randn(8, D), process.times(N)
    kl = path_kl(process, policy, policy, x_0, condition_of(8), times, tuned, generators(range(8)))
    assert not kl.any()


def test_masked_paths_count_what_is_unmasked() -> None:
    """Each masked entry is unmasked once on a path: the KL is that of its classes, once."""
    process, logits = MaskedProcess(3), torch.tensor([0.0, 1.0, -1.0])

    def reference(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros(*tensor_of(x_t).shape, 3)

    def policy(x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return logits.expand(*tensor_of(x_t).shape, 3)

    classes = (torch.distributions.Categorical(logits=v) for v in (logits, torch.zeros(3)))
    expected = D * kl_divergence(*classes)
    x_0, times = torch.zeros(B, D, dtype=torch.int64), process.times(N)
    tuned, noise = torch.ones(N, dtype=torch.bool), generators(range(B))
    kl = path_kl(process, policy, reference, x_0, condition_of(B), times, tuned, noise)
    assert abs(kl.mean() - expected) < 4 * kl.std() / B**0.5


@pytest.mark.parametrize("product", [False, True])
def test_a_distance_of_predictions_has_the_free_dimensions_alone(product: bool) -> None:
    """What predictions say of empty slots, and how they move the centre, moves no state."""
    process: Process = GaussianProcess(RectifiedFlow(), "velocity", PointClouds(2))
    x = torch.tensor([[[1.0, 0, 5], [-1, 0, 6], [0, 0, 0]]])  # two points, an empty slot
    apart = torch.tensor([[[3.0, 1, 2], [1, 1, 0], [7, 8, 9]]])  # centred: (1, 0), (-1, 0)
    states: list[State] = [x, torch.zeros_like(x), apart]
    if product:
        process = ProductProcess({"cloud": process})
        states = [{"cloud": tensor_of(state)} for state in states]
    x_t, reference, prediction = states
    distance = prediction_distance(process, prediction, reference, x_t)
    assert distance.tolist() == pytest.approx([(1 + 1 + 4) / (2 * 3 - 2)])
