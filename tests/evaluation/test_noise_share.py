"""The share of the initial noise: exact for linear samplers and for sums of known parts."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.noise_share import (
    components,
    crossed,
    golden_gains,
    linear_shares,
    noise_shares,
)
from tests.support import trainer_of

CONDITIONS, NOISES, WALKS = 24, 64, 3
STD = 0.7
VARIANCES = (0.5, 0.2, 0.4, 0.3)  # of conditions, noises, their interaction, the rest


class Sloped(Reward):
    """x[0] + slope x[1], with the condition's slope."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        slopes = torch.tensor([entry["slope"] for entry in condition.each()])
        return samples[:, 0] + slopes * samples[:, 1]


class Slopes(GaussianMixturePipeline):
    """One Gaussian, so that the sampler is affine, under conditions that the reward alone knows."""

    def encode(self, batch: Batch) -> Condition:
        slopes = [{"slope": float(slope)} for slope in batch["slope"]]
        return Condition(slopes, {}, torch.arange(len(slopes)))


def measured(
    eta: float, steps: int, reward: Reward, slopes: Tensor, num_completions: int
) -> tuple[Tensor, GaussianMixturePipeline]:
    """Return crossed rewards, and the pipeline."""
    settings: dict[str, Any] = {"schedule": "cosine_vp", "prediction_type": "v"}
    pipeline = Slopes([1.0], [[0.0, 0.0]], [STD], residual_width=0, **settings)
    sampler = Sampler(steps, eta)
    tuner = GRAFT(pipeline, reward, sampler=sampler, sampling_batch_size=512)
    tuner.trainer = trainer_of()
    tuner.setup("test")
    condition = pipeline.encode({"slope": slopes})
    route, seeds = tuner.reference_route(), list(range(NOISES))
    with torch.no_grad():
        return crossed(tuner.rollouts, route, condition, seeds, num_completions), pipeline


def decided(pipeline: GaussianMixturePipeline, steps: int, eta: float) -> float:
    """Return Var E[x_0 | x_1] / Var x_0 of the sampler for the data N(0, STD^2), by its recursion.

    Each step is x_s = a_s x0 + sqrt(s_s^2 - d^2) e + d z, with x0 = E[x_0 | x_t] and
    e = (x_t - a_t x0) / s_t linear in x_t, and d is eta times the posterior's deviation.
    """
    first, variance = 1.0, 0.0
    schedule = pipeline.process.schedule
    for t, s in pairwise(pipeline.process.times(steps)):
        (a_t, s_t), (a_s, s_s) = ([float(x) for x in schedule.levels(u)] for u in (t, s))
        d = eta * s_s * (1 - (a_t * s_s / (a_s * s_t)) ** 2) ** 0.5
        x0 = a_t * STD**2 / (a_t**2 * STD**2 + s_t**2)
        slope = a_s * x0 + (s_s**2 - d**2) ** 0.5 * (1 - a_t * x0) / s_t
        first, variance = slope * first, slope**2 * variance + d**2
    return first**2 / (first**2 + variance)


def parts(generator: torch.Generator, *sizes: int) -> Tensor:
    """Return rewards [C, n, R] that are sums of independent parts of known variances."""
    num, noises, walks = sizes
    shapes = [(num, 1, 1), (1, noises, 1), (num, noises, 1), (num, noises, walks)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return torch.stack(
        [v**0.5 * x.expand(sizes) for v, x in zip(VARIANCES, drawn, strict=True)]
    ).sum(dim=0)


def test_components_are_unbiased_and_errors_are_those_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [parts(generator, 12, 12, 2) for _ in range(120)]
    found = torch.tensor([components(table) for table in tables], dtype=torch.float64)
    errors = found.std(dim=0) / len(tables) ** 0.5
    assert ((found.mean(dim=0) - torch.tensor(VARIANCES)) / errors).abs().max() < 3.5
    # The jackknife's: not too small, and at most 1.6 times too large.
    shares = [noise_shares(table) for table in tables]
    for name in ("variance", "initial", "common", "own"):
        values = torch.tensor([share[name]["mean"] for share in shares])
        squares = torch.tensor([share[name]["sem"] for share in shares]).square()
        assert 0.9 < float(squares.mean().sqrt() / values.std()) < 1.6, name


def test_a_linear_sampler_shares_noise_as_its_slopes_do() -> None:
    """x_0 = a x_1: N = a x_1[0] where slopes are +-1, I = a slope x_1[1]; half and half."""
    slopes = torch.tensor([1.0, -1.0]).repeat(CONDITIONS // 2)
    rewards, _ = measured(0.0, 3, Sloped(), slopes, 1)
    assert rewards.shape == (CONDITIONS, NOISES, 1)
    shares = noise_shares(rewards)
    assert shares["initial"] == {"mean": 1.0, "sem": 0.0}
    for name in ("common", "own"):
        assert shares[name]["sem"] < 0.15
        assert shares[name]["mean"] == pytest.approx(0.5, abs=3 * shares[name]["sem"])


def test_slopes_of_one_sign_share_all_of_it() -> None:
    rewards, _ = measured(0.0, 3, Sloped(), torch.ones(5), 1)
    shares, gains = noise_shares(rewards), golden_gains(rewards)
    assert shares["common"]["mean"] == pytest.approx(1) and abs(shares["own"]["mean"]) < 1e-6
    best = float(rewards[0].max() - rewards[0].mean())
    assert gains["common"]["mean"] == pytest.approx(best)
    assert gains["own"]["mean"] == pytest.approx(best)


def test_noise_on_the_way_leaves_what_the_recursion_says() -> None:
    """One condition's law under all: what the ancestral sampler leaves open, all else is common."""
    steps, eta = 4, 0.6
    rewards, pipeline = measured(eta, steps, Coordinate(), torch.zeros(CONDITIONS), WALKS)
    initial = decided(pipeline, steps, eta)
    assert 0.2 < initial < 0.8
    shares = noise_shares(rewards)
    for name, expected in (("initial", initial), ("common", initial), ("own", 0.0)):
        assert shares[name]["sem"] < 0.15
        assert shares[name]["mean"] == pytest.approx(expected, abs=3 * shares[name]["sem"])


def test_the_linear_share_is_without_bias() -> None:
    """r = x[0] + s x[1] + x[2]^2 - 1, s = +-1: Var r = 4, of which 1 is linear for all, 2 each."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.tensor([1.0, -1.0]).repeat(4)
    found = []
    for _ in range(40):
        x = torch.randn(16, 5, generator=generator)
        rewards = x[:, 0] + slopes.unsqueeze(1) * x[:, 1] + x[:, 2] ** 2 - 1
        found.append(linear_shares(rewards.unsqueeze(2), x))
        # Numerators alone: a quotient of 16 noises has a bias of its own.
        within = noise_shares(rewards.unsqueeze(2))["variance"]["mean"]
        found[-1] |= {
            f"{name} square": {"mean": within * own["mean"], "sem": own["sem"]}
            for name, own in found[-1].items()
        }
    # Half of the slopes are 1: two different conditions agree in s less often than two of any.
    expected = {"common square": 1 - 1 / 7, "each square": 2.0}
    for name, value in expected.items():
        values = torch.tensor([own[name]["mean"] for own in found])
        assert abs(values.mean() - value) < 3 * values.std() / len(values) ** 0.5, name
    for name in ("common", "each"):
        values = torch.tensor([own[name]["mean"] for own in found])
        squares = torch.tensor([own[name]["sem"] for own in found]).square()
        assert 0.7 < float(squares.mean().sqrt() / values.std()) < 2, name


def test_golden_noise_is_judged_where_it_was_not_chosen() -> None:
    """Rewards of pure chance: one noise for all gains nothing; best of n of single walks does."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(400, 16, 4, generator=generator)
    gains = golden_gains(rewards)
    for name in ("common", "own"):
        assert abs(gains[name]["mean"]) < 3 * gains[name]["sem"] < 0.2, name
    # E max of 16 normal numbers is 1.766.
    alone = golden_gains(rewards[..., :1])["own"]
    assert alone["mean"] == pytest.approx(1.766, abs=3 * alone["sem"])


def test_a_common_noise_is_chosen_by_the_other_conditions_by_hand() -> None:
    """The first condition alone would choose its first noise, the second alone its second."""
    gains = golden_gains(torch.tensor([[1.0, 0.0], [0.0, 3.0]]).unsqueeze(2))
    assert gains["common"] == pytest.approx({"mean": -1.0, "sem": 0.5})  # -1/2 and -3/2
    assert gains["own"] == pytest.approx({"mean": 1.0, "sem": 0.5})
    # Of three walks the first one chooses, and the others are counted.
    walks = torch.tensor([[[5.0, 0.0, 1.0], [0.0, 4.0, 3.0]], [[0.0, 2.0, 2.0], [1.0, 6.0, 4.0]]])
    assert golden_gains(walks)["own"]["mean"] == pytest.approx((-1.5 + 1.5) / 2)


def test_what_could_not_be_scored_is_left_out_and_a_constant_has_no_share() -> None:
    rewards = parts(torch.Generator().manual_seed(0), 5, 6, 1)
    more = torch.cat([rewards, rewards[:1].clone()])
    more[5, 2] = torch.nan
    assert noise_shares(more) == noise_shares(rewards)
    assert golden_gains(more) == golden_gains(rewards)
    same = noise_shares(torch.ones(3, 3, 1))
    assert same["variance"]["mean"] == 0 and same["common"]["mean"] != same["common"]["mean"]


@pytest.mark.parametrize(("eta", "walks", "says"), [(0.0, 2, "must be 1"), (1.0, 1, "at least 2")])
def test_walks_fit_the_sampler(eta: float, walks: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measured(eta, 2, Coordinate(), torch.ones(2), walks)
