"""What noise PPO learns: the optima of closed forms, and nothing where there is nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.reward import Reward
from tests.algorithms.noise_ppo_support import Raw, affine, tuner_of
from tests.support import trainer_of


class Unrelated(Reward):
    """Fresh numbers at every call, whatever the samples."""

    num_calls = 0

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        self.num_calls += 1
        return torch.randn(len(samples), generator=torch.Generator().manual_seed(self.num_calls))


class Sided(GaussianMixturePipeline):
    """One Gaussian under two conditions, which say where the reward is: `side` is 1 or -1."""

    def __init__(self) -> None:
        super().__init__([1.0], [[0.5, -0.25]], [0.6], residual_width=0)

    def encode(self, batch: Batch) -> Condition:
        entries, tables = [{"side": 1.0}, {"side": -1.0}], {"side": torch.tensor([1.0, -1.0])}
        return Condition(entries, tables, batch["index"].cpu() % 2)


class Ordered(Sided):
    """The sides as texts of the same two tokens in another order: their average is the same."""

    def tokens(self, condition: Condition) -> Tensor:
        places, words = torch.eye(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        texts = torch.cat([places.expand(2, 2, 2), words.unsqueeze(2)], dim=2)
        return texts[condition.rows]

    def features(self, condition: Condition) -> Tensor:
        return self.tokens(condition).mean(dim=1)


class OnItsSide(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return condition.table("side") * samples[:, 0]


class Constant(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.ones(len(samples))


def fit(tuner: NoisePPO, folder: Path, *, num_conditions: int, num_rounds: int) -> NoisePPO:
    data = MixtureData(num_train=num_conditions, batch_size=num_conditions)
    trainer_of(max_epochs=num_rounds, default_root_dir=folder).fit(tuner, data)
    return tuner


@torch.no_grad()
def learned(tuner: NoisePPO) -> tuple[Tensor, Tensor]:
    law = tuner.prior(tuner.pipeline.example())
    return law.loc[0], law.std[0]


def annealed(num_rounds: int) -> dict[str, Any]:
    """Return settings of two large updates a round, whose rate falls to zero."""
    return {
        "minibatch_size": 512,
        "sampling_batch_size": 1024,
        "num_epochs": 2,
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.003),
        "lr_scheduler": lambda o: LambdaLR(o, lambda i: max(0.0, 1 - i / (2 * num_rounds))),
    }


def test_the_optimum_under_the_kl_is_found(tmp_path: Path) -> None:
    """E[a x_1] - beta KL is largest at mu = a / beta, sigma = 1."""
    beta = 0.8
    num_rounds = 150
    tuner = tuner_of(
        num_candidates=64,
        advantage=Raw(),
        advantage_clip=None,
        beta=beta,
        **annealed(num_rounds),
    )
    fit(tuner, tmp_path, num_conditions=8, num_rounds=num_rounds)
    a, _ = affine(tuner)
    mu, sigma = learned(tuner)
    np.testing.assert_allclose(mu, [a / beta, 0], atol=0.06)
    np.testing.assert_allclose(sigma, [1, 1], atol=0.05)


@pytest.mark.slow
def test_group_advantages_find_the_optimum_of_the_standardised_reward(tmp_path: Path) -> None:
    """A = (r - mean) / std of groups of M normals: mu = E[std_M] / beta, for any slope a."""
    num_rounds, num_candidates, beta = 120, 16, 1.5
    tuner = tuner_of(
        num_candidates=num_candidates,
        beta=beta,
        **annealed(num_rounds),
    )
    fit(tuner, tmp_path, num_conditions=32, num_rounds=num_rounds)
    m = num_candidates
    std = math.sqrt(2 / m) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2))
    mu, sigma = learned(tuner)
    np.testing.assert_allclose(mu, [std / beta, 0], atol=0.06)
    np.testing.assert_allclose(sigma, [1, 1], atol=0.05)


def test_rewards_that_do_not_depend_on_the_noise_teach_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_candidates": 16,
        "beta": 0.1,
        "minibatch_size": 512,
        "sampling_batch_size": 1024,
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.003),
    }
    runs = {}
    for reward in (Coordinate(), Unrelated(), Constant()):
        tuner = tuner_of(reward, **settings)
        fit(tuner, tmp_path, num_conditions=32, num_rounds=50)
        runs[reward.name] = learned(tuner)
    assert runs["Coordinate"][0][0] > 1
    mu, sigma = runs["Unrelated"]
    assert mu.abs().max() < 0.15 and (sigma - 1).abs().max() < 0.15
    mu, sigma = runs["Constant"]
    assert torch.equal(mu, torch.zeros(2)) and torch.equal(sigma, torch.ones(2))


@pytest.mark.parametrize(
    ("pipeline", "settings", "together"),
    [
        pytest.param(Sided, {}, False, id="features"),
        pytest.param(Sided, {"condition_free": True}, True, id="control"),
        pytest.param(Ordered, {}, True, id="average of tokens", marks=pytest.mark.slow),
        pytest.param(Ordered, {"attention_heads": 2}, False, id="attention"),
    ],
)
def test_each_condition_gets_a_prior_of_its_own(
    tmp_path: Path, pipeline: type[Sided], settings: dict[str, Any], together: bool
) -> None:
    """Alone, two opposite rewards pull mu apart; together, they leave it where it is."""
    tuner = tuner_of(
        OnItsSide(),
        pipeline(),
        num_candidates=16,
        beta=1.0,
        minibatch_size=512,
        sampling_batch_size=1024,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.005),
        **settings,
    )
    fit(tuner, tmp_path, num_conditions=32, num_rounds=50)
    with torch.no_grad():
        law = tuner.prior(tuner.pipeline.encode({"index": torch.arange(2)}))
    std = 0.95  # of 16 normals, on average
    expected = torch.tensor([0.0, 0.0] if together else [std, -std])
    assert (law.loc[:, 0] - expected).abs().max() < 0.2
    assert law.loc[:, 1].abs().max() < 0.2
    assert torch.allclose(law.loc[0], law.loc[1], atol=1e-5) is together
