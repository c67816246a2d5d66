"""DiffusionNFT: its minimiser in closed form, its parts, and what it learns."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.nft import DiffusionNFT, contrastive_loss
from lit_rlft.core.checks import UsageError
from lit_rlft.core.implicit import centred, group_probabilities, implicit
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess, PredictionType
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import State, tensor_of
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.old_policy import OldPolicy
from tests.algorithms.graft_support import Guided, ModeValue, nearest
from tests.algorithms.test_noise_ppo_learning import Unrelated
from tests.support import trainer_of

NAN = math.nan


def minimiser(
    process: GaussianProcess,
    old: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: float,
    good: Tensor,
    mass: Tensor,
    beta: float,
) -> Tensor:
    """Return the f [d] that minimises the loss at one x_t, which is quadratic in f.

    Args:
        process: The process.
        old: f_old at x_t, [d].
        x_0: Points [n, d] that x_t may come from.
        x_t: The point, [d].
        t: Its level.
        good: r of each x_0, [n].
        mass: Posterior of each x_0, [n], sum 1.
        beta: The strength.
    """
    num = len(x_0)

    def expected(f: Tensor) -> Tensor:
        times = torch.full((num,), t, dtype=torch.float64)
        here = (value.expand(num, -1) for value in (f, old))
        losses = contrastive_loss(process, *here, x_0, x_t.expand(num, -1), times, good, beta=beta)
        return mass @ losses

    gradient = torch.autograd.functional.jacobian(expected, old)
    hessian = torch.autograd.functional.hessian(expected, old)
    assert isinstance(gradient, Tensor) and isinstance(hessian, Tensor)
    return old - torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize(
    ("t", "point", "moves"), [(0.5, 0.3, -0.63222), (0.8, -1.0, -0.65889), (0.2, 1.0, -0.11863)]
)
def test_the_minimiser_for_a_normal_law(t: float, point: float, moves: float) -> None:
    """p_old = N(0, 1) on straight lines, r = Phi(x_0), beta = 1: computed by hand elsewhere."""
    x_0 = torch.linspace(-9, 9, 20001, dtype=torch.float64).unsqueeze(1)
    logits = -0.5 * x_0.square() - 0.5 * ((point - (1 - t) * x_0) / t).square()
    mass = logits.flatten().softmax(dim=0)
    old = torch.tensor([(2 * t - 1) * point / ((1 - t) ** 2 + t**2)], dtype=torch.float64)
    process = GaussianProcess(RectifiedFlow(), "velocity")
    x_t = torch.tensor([point], dtype=torch.float64)
    good = torch.special.ndtr(x_0).flatten()
    found = minimiser(process, old, x_0, x_t, t, good, mass, beta=1.0)
    assert float(found - old) == pytest.approx(moves, abs=6e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v", "velocity", "sample"])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_minimiser_for_the_mixture(kind: PredictionType, beta: float) -> None:
    """f_old + 2 / beta E[r] (E[target | good] - f_old), with the exact denoiser, by quadrature."""
    schedule = "rectified_flow" if kind == "velocity" else "discrete_vp"
    pipeline = GaussianMixturePipeline(
        schedule=schedule, prediction_type=kind, residual_width=0
    ).double()
    process, t = pipeline.process, 0.45
    axis = torch.linspace(-5, 5, 321, dtype=torch.float64)
    x_0 = torch.cartesian_prod(axis, axis)
    alpha, sigma = process.schedule.levels(torch.tensor([t], dtype=torch.float64))
    x_t = torch.tensor([0.7, -0.2], dtype=torch.float64)
    noise = (x_t - alpha * x_0) / sigma
    mixture = pipeline.mixture
    squares = (x_0.unsqueeze(1) - mixture.means.double()).square().sum(dim=2)
    components = mixture.weights.double().log() - squares / (2 * mixture.stds.double() ** 2)
    density = (components - 2 * mixture.stds.double().log()).logsumexp(dim=1)
    mass = (density - 0.5 * noise.square().sum(dim=1)).softmax(dim=0)
    good = (0.3 * x_0[:, 0] - 0.5 * x_0[:, 1]).sigmoid()
    times = torch.full((1,), t, dtype=torch.float64)
    condition = pipeline.encode({"index": torch.zeros(1)})
    with torch.no_grad():
        old = tensor_of(pipeline.predict(x_t.unsqueeze(0), times, condition))[0]
    target = process.prediction(x_0, noise, times)
    torch.testing.assert_close(mass @ target, old, rtol=0, atol=1e-5)  # it is the exact denoiser
    share = mass @ good
    wanted = old + 2 / beta * share * ((mass * good) @ target / share - old)
    found = minimiser(process, old, x_0, x_t, t, good, mass, beta)
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)


def test_a_self_normalised_loss_has_the_same_direction() -> None:
    """By hand: the squared error of x_0 over its mean absolute error, which has no gradient."""
    process = GaussianProcess(RectifiedFlow(), "sample")
    x_0, x_t = torch.zeros(1, 2), torch.zeros(1, 2)
    old, f = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 3.0]], requires_grad=True)
    t, good = torch.full((1,), 0.5).double(), torch.tensor([0.75])
    loss = contrastive_loss(process, f, old, x_0, x_t, t, good, 0.5, "self_normalized")
    plus, minus = (1.5**2 + 9) / 2 / 2.25, (0.5**2 + 9) / 2 / 1.75
    assert float(loss) == pytest.approx(0.75 * plus + 0.25 * minus)
    (gradient,) = torch.autograd.grad(loss.sum(), f)
    own = 0.75 * 0.5 * 1.5 / 2.25 - 0.25 * 0.5 * 0.5 / 1.75
    assert float(gradient[0, 0]) == pytest.approx(own)
    exact = contrastive_loss(process, x_0, x_0, x_0, x_t, t, good, 0.5, "self_normalized")
    assert exact.tolist() == [0.0]


def test_logits_start_in_the_direction_of_the_native_loss() -> None:
    """At f = f_old the gradient is beta (2 r - 1) times that of the model's own loss."""
    process, generator = MaskedProcess(3), torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 3, (5, 4), generator=generator)
    x_t = x_0.where(torch.rand(5, 4, generator=generator) < 0.4, process.mask)
    t = torch.full((5,), 0.6, dtype=torch.float64)
    old = torch.randn(5, 4, 3, generator=generator)
    good = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    f = old.clone().requires_grad_()
    loss = contrastive_loss(process, f, old, x_0, x_t, t, good, beta=0.7)
    native = process.loss(f, x_0, x_t, torch.zeros_like(t), t)
    found, wanted = (torch.autograd.grad(part.sum(), f)[0] for part in (loss, native))
    torch.testing.assert_close(found, wanted * (0.7 * (2 * good - 1)).view(-1, 1, 1))


def test_probabilities_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0, NAN], [0.0, 10.0, 5.0]])
    found = group_probabilities(rewards, scale=4.0, clip=1.0)
    torch.testing.assert_close(
        found,
        torch.tensor([[0.375, 0.625, NAN], [0.0, 1.0, 0.5]], dtype=torch.float64),
        equal_nan=True,
    )
    wider = group_probabilities(rewards, scale=4.0, clip=2.0)
    assert wider[1].tolist() == pytest.approx([0.1875, 0.8125, 0.5])
    assert group_probabilities(torch.ones(1, 2), 0.0, 1.0).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("num", [3, 6, 7])
def test_equal_rewards_do_not_differ_by_rounding(num: int) -> None:
    rewards = torch.tensor([0.1, 0.7, 1e6 / 3], dtype=torch.float64).unsqueeze(1).expand(3, num)
    assert not centred(rewards).any()
    some = torch.cat([rewards, torch.full((3, 1), NAN)], dim=1)
    assert not centred(some)[:, :num].any() and centred(some)[:, num].isnan().all()
    assert centred(torch.full((1, 2), NAN)).isnan().all()


def test_implicit_policies_mirror_each_other() -> None:
    old: State = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    new: State = {"a": torch.ones(2, 3), "b": torch.full((2,), 3.0)}
    found = implicit(new, old, torch.tensor([0.5, -0.5]))
    assert isinstance(found, dict)
    assert found["a"][:, 0].tolist() == [0.5, -0.5] and found["b"].tolist() == [2.0, 0.0]


def test_implicit_policies_keep_what_is_certain_and_its_neighbours_gradient() -> None:
    old = torch.tensor([[0.0, -math.inf], [1.0, 2.0]])
    new = torch.tensor([[0.0, -math.inf], [3.0, 2.0]], requires_grad=True)
    found = implicit(new, old, torch.tensor([2.0, -1.0]))
    assert isinstance(found, Tensor)
    assert found.tolist() == [[0.0, -math.inf], [-1.0, 2.0]]
    (gradient,) = torch.autograd.grad(found[1].sum() + found[0, 0], new)
    assert gradient.tolist() == [[2.0, 0.0], [-1.0, -1.0]]


def test_the_old_policy_lends_its_weights() -> None:
    layer = nn.Linear(2, 2, bias=False)
    trained, policy = dict(layer.named_parameters()), OldPolicy()
    start = layer.weight.detach().clone()
    with policy.active(trained):
        pass
    with torch.no_grad():
        layer.weight.add_(1)
    x = torch.ones(1, 2, requires_grad=True)
    y = layer(x).sum()
    with policy.active(trained):
        assert torch.equal(layer.weight, start) and not torch.is_grad_enabled()
    assert torch.equal(layer.weight, start + 1)
    y.backward()  # the graph has the weights that it was built with
    assert x.grad is not None and torch.equal(x.grad[0], (start + 1).sum(dim=0))
    policy.follow(trained, decay=0.25)
    resumed = OldPolicy()
    resumed.load_state_dict(policy.state_dict())
    for own in (policy, resumed):
        with own.active(trained):
            torch.testing.assert_close(layer.weight.detach(), start + 0.75)
    other = dict(nn.Linear(2, 2).named_parameters())
    with pytest.raises(UsageError, match="lora settings"), resumed.active(other):
        pass


def test_the_old_policy_arrives_also_in_half_precision() -> None:
    """A tenth of what is left is below the digits of bfloat16 long before the end."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    trained, policy = dict(layer.named_parameters()), OldPolicy()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        with policy.active(trained):
            pass
        layer.weight.fill_(1.03125)
    for _ in range(100):
        policy.follow(trained, decay=0.9)
    with policy.active(trained):
        assert layer.weight.item() == 1.03125 and layer.weight.dtype == torch.bfloat16
    assert policy.state_dict()["weight"].dtype == torch.float32


def tuner_of(reward: Reward, **settings: Any) -> DiffusionNFT:
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    base: dict[str, Any] = {"sampler": Sampler(8), "num_candidates": 8, "minibatch_size": 128}
    return DiffusionNFT(pipeline, reward, **{**base, **settings})


def values(tuner: DiffusionNFT, num: int = 2048) -> Tensor:
    """Return the value of the mode nearest to each of new samples, [num]."""
    condition = tuner.pipeline.encode({"index": torch.arange(num)})
    seeds = range(10**6, 10**6 + num)
    with torch.no_grad():
        (x_0,) = tuner.rollouts.draw(tuner.route(), condition, seeds, keep=[8])
    return ModeValue()(x_0, condition)


@pytest.mark.parametrize(
    "weighting", ["native", pytest.param("self_normalized", marks=pytest.mark.slow)]
)
def test_it_gains_and_an_unrelated_reward_does_not(tmp_path: Path, weighting: str) -> None:
    def gain(reward: Reward) -> tuple[float, float]:
        settings = {"optimizer": lambda p: torch.optim.Adam(p, lr=2e-3), "weighting": weighting}
        tuner = tuner_of(reward, **settings)
        data = MixtureData(num_train=64, batch_size=64)
        tuner.trainer = trainer_of()
        tuner.setup("fit")
        before = values(tuner)
        trainer_of(max_epochs=4, default_root_dir=tmp_path).fit(tuner, data)
        apart = values(tuner) - before
        return float(apart.mean()), float(apart.std()) / len(apart) ** 0.5

    moved, error = gain(ModeValue())
    assert moved > 0.5 and moved > 5 * error
    moved, error = gain(Unrelated())
    assert moved < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"beta": 0.0}, "beta"),
        ({"max_decay": 1.0}, "max_decay"),
        ({"decay_after": -1}, "decay_after"),
        ({"kl_coef": -1e-4}, "kl_coef"),
        ({"weighting": "published"}, "weighting is 'published'; use 'native' or 'self_normalized'"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tuner_of(ModeValue(), **settings).setup("fit")


def test_the_published_decays() -> None:
    """Types 1 and 2 of the authors' code, where each round makes one update."""

    def decays(**settings: Any) -> list[float]:
        tuner, found = tuner_of(ModeValue(), **settings), []
        for num_rounds in (1, 75, 76, 100, 500, 1000):
            tuner.num_rounds = num_rounds
            found.append(tuner._decay)
        return found

    assert decays() == pytest.approx([0.001, 0.075, 0.076, 0.1, 0.5, 0.5])
    second = decays(decay_after=75, decay_rate=0.0075, max_decay=0.999)
    assert second == pytest.approx([0, 0, 0.0075, 0.1875, 0.999, 0.999])


def test_the_penalty_is_the_distance_to_the_reference() -> None:
    """At the levels of the loss, and with its gradient; without it the reference does not run."""

    def gradient(value: Tensor, tuner: DiffusionNFT) -> Tensor:
        found = torch.autograd.grad(value.sum(), [*tuner._trained().values()], retain_graph=True)
        return torch.cat([part.flatten() for part in found])

    def loss_of(kl_coef: float, reference: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        tuner = tuner_of(ModeValue(), kl_coef=kl_coef)
        tuner.setup("fit")
        with tuner._sampling_policy():
            pass
        with torch.no_grad():
            for weight in tuner._trained().values():
                weight.add_(0.1)
        tuner.reference.forward = reference(tuner)  # type: ignore[method-assign]
        x_0 = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
        condition = tuner.pipeline.encode({"index": torch.arange(6)})
        good = torch.linspace(0, 1, 6)
        experience = Experience({"x_0": x_0, "good": good}, condition, list(range(6)))
        losses, values = tuner.loss(experience, generators(range(6)))
        return losses.detach(), values, gradient(losses, tuner)

    apart: list[Tensor] = []
    pulls: list[Tensor] = []

    def compared(tuner: DiffusionNFT) -> Any:
        own = type(tuner.reference).forward

        def forward(x_t: State, t: Tensor, condition: Condition) -> State:
            found = own(tuner.reference, x_t, t, condition)
            with torch.enable_grad():
                difference = tensor_of(tuner.pipeline(x_t, t, condition)) - tensor_of(found)
                pulls.append(gradient(difference.square().mean(dim=1), tuner))
            apart.append(difference.detach())
            return found

        return forward

    losses, values, with_pull = loss_of(0.5, compared)
    without, none, plain = loss_of(0.0, lambda _: lambda *_: pytest.fail("it ran"))
    distance = apart[0].square().mean(dim=1)
    assert distance.min() > 1e-5 and not none
    torch.testing.assert_close(values["reference_distance"], distance, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses, without + 0.5 * distance, rtol=1e-5, atol=1e-6)
    assert pulls[0].abs().max() > 1e-3
    torch.testing.assert_close(with_pull, plain + 0.5 * pulls[0], rtol=1e-4, atol=1e-5)


def test_a_penalty_on_classes_is_refused() -> None:
    tuner = tuner_of(ModeValue(), kl_coef=1e-4)
    tuner.pipeline.process = MaskedProcess(3)
    with pytest.raises(UsageError, match="kl_coef must be 0 for a MaskedProcess"):
        tuner.check()


def test_an_error_while_sampling_leaves_the_trained_weights() -> None:
    tuner = tuner_of(ModeValue())
    tuner.setup("fit")
    (weight, *_) = tuner._trained().values()
    start = weight.detach().clone()
    with tuner._sampling_policy():
        pass
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(KeyError), tuner._sampling_policy():
        assert torch.equal(weight, start)
        raise KeyError
    assert torch.equal(weight, start + 1) and torch.is_grad_enabled()


def test_the_old_policy_keeps_more_of_itself_from_round_to_round() -> None:
    """By hand: 0.3 after the first round, then max_decay; the trained weight grows by 1 in each."""
    tuner = tuner_of(ModeValue(), decay_rate=0.3, max_decay=0.5)
    tuner.setup("fit")
    (weight, *_) = tuner._trained().values()
    start = weight.detach().clone()
    for tuner.num_rounds, moved in enumerate((0.0, 0.7, 0.5 * 0.7 + 0.5 * 2, 0.5 * 1.35 + 0.5 * 3)):
        with tuner._sampling_policy():
            torch.testing.assert_close(weight.detach(), start + moved)
        with torch.no_grad():
            weight.add_(1)


def test_the_loss_by_hand_of_what_is_sampled_from() -> None:
    """Guided predictions of both policies; straight lines, and levels and noise by seed."""
    pipeline = Guided(schedule="rectified_flow", prediction_type="velocity")
    tuner, seeds = DiffusionNFT(pipeline, ModeValue(), sampler=Sampler(8), beta=0.5), [3, 4, 5]
    tuner.setup("fit")
    with tuner._sampling_policy():
        frozen = copy.deepcopy(pipeline)
    trained = list(tuner._trained().values())
    for weight in trained:
        weight.data += 0.2 * torch.randn(weight.shape)
    x_0, good = torch.randn(3, 2), torch.tensor([0.0, 0.3, 1.0])
    condition = pipeline.encode({"index": torch.arange(3)})
    losses, _ = tuner.loss(
        Experience({"x_0": x_0, "good": good}, condition, seeds), generators(seeds)
    )
    noise = generators(seeds)
    t = pipeline.process.draw_times(torch.stack([torch.rand((), generator=g) for g in noise]))
    epsilon = torch.stack([torch.randn(2, generator=own) for own in noise])
    x_t = (1 - t.float().unsqueeze(1)) * x_0 + t.float().unsqueeze(1) * epsilon
    f, old = (1.5 * tensor_of(one.predict(x_t, t, condition)) for one in (pipeline, frozen))
    plus, minus = (
        (old.detach() + side * (f - old.detach()) - (epsilon - x_0)).square().mean(dim=1)
        for side in (0.5, -0.5)
    )
    wanted = good * plus + (1 - good) * minus
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), trained) for each in (losses, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_probabilities_are_by_the_deviation_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The population's, of what could be scored."""
    tuner = tuner_of(ModeValue(), reward_clip=2.0)
    tuner.trainer = trainer_of()
    other = torch.tensor([-3.0, 3.0, 1.0, -1.0], dtype=torch.float64)
    monkeypatch.setattr("lit_rlft.algorithms.nft.gather", lambda own, size: [own, other])
    groups = torch.tensor([[1.0, 3.0, NAN], [0.0, 9.0, 6.0]])
    apart = np.array([[-1.0, 1.0, NAN], [-5.0, 4.0, 1.0]])
    scale = np.concatenate([apart[np.isfinite(apart)], other.numpy()]).std()
    wanted = 0.5 + (apart / scale).clip(-2, 2) / 4
    np.testing.assert_allclose(tuner._probabilities(groups).numpy(), wanted, rtol=1e-12)


class Failing(Reward):
    """NaN for the samples of one mode."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return ModeValue()(samples, condition).where(nearest(samples) != 0, NAN)


def test_failed_rewards_are_left_out(tmp_path: Path) -> None:
    tuner = tuner_of(Failing())
    collect, seen = tuner.collect, []

    def recorded(*args: Any) -> Any:
        seen.append(collect(*args))
        return seen[-1]

    tuner.collect = recorded  # type: ignore[method-assign]
    data = MixtureData(num_train=64, batch_size=64)
    trainer_of(max_epochs=1, default_root_dir=tmp_path).fit(tuner, data)
    (experience,) = seen
    assert 0 < experience.metrics["failed_rewards"] < 0.5
    assert sum(experience.counts) == len(experience) < 64 * 8
    assert tensor_of(experience.states["good"]).isfinite().all()
