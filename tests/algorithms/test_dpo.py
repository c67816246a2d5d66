"""Diffusion-DPO: its loss at known points, its pairs, and what it learns."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.dpo import DiffusionDPO, best_and_worst, preference_loss
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators, paired, randn_like
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from tests.algorithms.graft_support import Guided, ModeValue
from tests.algorithms.test_noise_ppo_learning import Constant, Unrelated
from tests.support import trainer_of

NAN = math.nan


def test_the_loss_by_hand() -> None:
    losses, values = preference_loss(
        torch.tensor([0.0, -0.1, 0.2]), torch.tensor([0.0, 0.2, 0.1]), beta=10.0
    )
    margins = [0.0, 3.0, -1.0]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-m)) for m in margins])
    assert values["implicit_margin"].tolist() == pytest.approx(margins)
    assert values["implicit_accuracy"].tolist() == [0.5, 1.0, 0.0]


def test_pairs_are_the_best_and_the_worst_that_were_scored() -> None:
    groups = torch.tensor(
        [[1.0, 3.0, 2.0], [NAN, 5.0, 4.0], [2.0, 2.0, 2.0], [NAN, 1.0, NAN], [NAN, NAN, NAN]]
    )
    assert best_and_worst(groups).tolist() == [[1, 0], [4, 5]]


def test_a_pair_draws_the_same_noise_twice() -> None:
    one, other = paired(generators([3, 4]), 2)
    like = torch.empty(2, 8)
    first = randn_like(like, one)
    assert torch.equal(first, randn_like(like, other))
    assert not torch.equal(first[0], first[1])
    again, _ = paired(generators([3, 9]), 2)
    assert torch.equal(randn_like(like, again)[0], first[0])


def tuner_of(
    reward: Reward, pipeline: GaussianMixturePipeline | None = None, **settings: Any
) -> DiffusionDPO:
    pipeline = pipeline or GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity"
    )
    base: dict[str, Any] = {"sampler": Sampler(8), "num_candidates": 4, "minibatch_size": 32}
    return DiffusionDPO(pipeline, reward, **{"beta": 2.0, **base, **settings})


def test_at_the_reference_it_is_log_2_and_without_preference() -> None:
    tuner = tuner_of(ModeValue())
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    batch = {"index": torch.arange(16)}
    with torch.no_grad():
        experience = tuner.collect(batch, tuner.pipeline.encode(batch))
    losses, values = tuner.loss(experience, generators(experience.seeds))
    assert losses.detach() == pytest.approx(math.log(2))
    assert values["implicit_accuracy"].tolist() == [0.5] * len(experience)
    reward = ModeValue()
    own, other = (
        reward(tensor_of(experience.states[name]), experience.condition)
        for name in ("preferred", "rejected")
    )
    assert (own > other).all() and len(own) == sum(experience.counts or [])
    gradient = torch.autograd.grad(losses.sum(), list(tuner._trained().values()))
    assert any(part.any() for part in gradient)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_loss_and_gradient_by_hand(moved: float, guided: bool) -> None:
    """At the reference beta / 2 times the difference of the two denoising losses, noised alike."""
    pipeline = Guided(schedule="rectified_flow", prediction_type="velocity")
    tuner = tuner_of(ModeValue(), pipeline, beta=3.0, guided_loss=guided)
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    batch = {"index": torch.arange(4)}
    with torch.no_grad():
        experience = tuner.collect(batch, tuner.pipeline.encode(batch))
    frozen, scale = copy.deepcopy(pipeline), 1.5 if guided else 1.0
    trained, num = list(tuner._trained().values()), len(experience)
    for weight in trained:
        weight.data += moved * torch.randn(weight.shape)
    losses, logged = tuner.loss(experience, generators(experience.seeds))
    found = torch.autograd.grad(losses.sum(), trained)
    # The same levels and noise, drawn as a pair's are.
    noise = generators(experience.seeds)
    t = torch.stack([torch.rand((), generator=own) for own in noise])
    t = pipeline.process.draw_times(t)
    seeds = [int(torch.randint(2**62, (), generator=own)) for own in noise]
    apart, change = torch.zeros(num), torch.zeros(num)
    for name, sign in (("preferred", 1.0), ("rejected", -1.0)):
        x_0 = tensor_of(experience.states[name])
        epsilon = torch.stack([torch.randn(2, generator=own) for own in generators(seeds)])
        level = t.float().unsqueeze(1)
        x_t = (1 - level) * x_0 + level * epsilon  # straight lines
        own, other = (
            (scale * tensor_of(one.predict(x_t, t, experience.condition)) - (epsilon - x_0))
            .square()
            .mean(dim=1)
            for one in (pipeline, frozen)
        )
        apart, change = apart + sign * own, change + sign * (own - other).detach()
    exact: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(losses.detach(), torch.log1p((3.0 * change).exp()), **exact)
    torch.testing.assert_close(logged["implicit_margin"], -3.0 * change, **exact)
    assert bool(change.any()) == bool(moved)
    wanted = torch.autograd.grad((3.0 * (3.0 * change).sigmoid() * apart).sum(), trained)
    assert num > 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("iterative", [True, False])
def test_candidates_are_of_the_reference_unless_iterative(iterative: bool) -> None:
    batch, drawn = {"index": torch.arange(4)}, []
    for moved in (0.0, 0.5):
        tuner = tuner_of(ModeValue(), iterative=iterative)
        tuner.trainer = trainer_of()
        tuner.setup("fit")
        for weight in tuner._trained().values():
            weight.data += moved
        with torch.no_grad():
            experience = tuner.collect(batch, tuner.pipeline.encode(batch))
        drawn.append(tensor_of(experience.states["preferred"]))
    assert torch.equal(*drawn) is not iterative


def values(tuner: DiffusionDPO, num: int = 2048) -> Tensor:
    condition: Condition = tuner.pipeline.encode({"index": torch.arange(num)})
    seeds = range(10**6, 10**6 + num)
    with torch.no_grad():
        (x_0,) = tuner.rollouts.draw(tuner.route(), condition, seeds, keep=[8])
    return ModeValue()(x_0, condition)


def test_it_gains_and_an_unrelated_reward_does_not(tmp_path: Path) -> None:
    def gain(reward: Reward) -> tuple[float, float]:
        tuner = tuner_of(reward, optimizer=lambda p: torch.optim.Adam(p, lr=2e-3))
        tuner.trainer = trainer_of()
        tuner.setup("fit")
        before = values(tuner)
        data = MixtureData(num_train=96, batch_size=96)
        trainer_of(max_epochs=6, default_root_dir=tmp_path).fit(tuner, data)
        apart = values(tuner) - before
        return float(apart.mean()), float(apart.std()) / len(apart) ** 0.5

    moved, error = gain(ModeValue())
    assert moved > 0.3 and moved > 5 * error
    moved, error = gain(Unrelated())
    assert moved < 0.1


def test_a_round_without_a_difference_teaches_nothing(tmp_path: Path) -> None:
    """And the run goes on: a binary reward may be the same for all samples of a round."""
    tuner, data = tuner_of(Constant()), MixtureData(num_train=4, batch_size=4)
    trainer_of(max_epochs=2, default_root_dir=tmp_path).fit(tuner, data)
    assert tuner.num_rounds == 2 and tuner.num_updates == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_candidates": 1}, "num_candidates must be at least 2"), ({"beta": 0.0}, "beta")],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tuner_of(ModeValue(), **settings).setup("fit")
