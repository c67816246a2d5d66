"""Adjoint matching on the mixture: the tilted law, where DRaFT is not, and a control."""

from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.kit.statistics import gaussian, median_distance, mmd, similarity
from tests.support import trainer_of

SCALE, SIZE, ROUNDS, POINTS = 1.5, 128, 150, 2000


def tilted() -> Mixture:
    """The default mixture, times e^{1.5 x} of the first coordinate: a mixture again."""
    weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, MEANS, STDS))
    weights = weights * (SCALE * means[:, 0] + (SCALE * stds) ** 2 / 2).exp()
    shift = torch.stack([SCALE * stds**2, torch.zeros_like(stds)], dim=1)
    return Mixture(weights / weights.sum(), means + shift, stds)


class Law:
    """Exact draws of the tilted law, and how far other points are from them."""

    def __init__(self) -> None:
        def draw(seed: int) -> Tensor:
            return tilted().sample(POINTS, torch.Generator().manual_seed(seed))

        self.exact = draw(0)
        self.kernel = gaussian(median_distance(self.exact))
        self.known = similarity(self.exact, self.kernel)
        self.chance = [self.distance(draw(seed)) for seed in range(1, 21)]

    def distance(self, points: Tensor) -> float:
        """Return the squared MMD from exact draws."""
        return mmd(self.exact, points, self.kernel, self.known)


@pytest.fixture(scope="module")
def law() -> Law:
    return Law()


def pipeline() -> GaussianMixturePipeline:
    flow: Any = {"schedule": "rectified_flow", "prediction_type": "velocity"}
    return GaussianMixturePipeline(**flow, residual_width=0)


def trained(tuner: RewardFineTuner) -> RewardFineTuner:
    """Take one step of Adam in each of the rounds."""
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    weights = list(tuner._trained().values())
    optimizer = torch.optim.Adam(weights, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ROUNDS)
    batch = {"index": torch.arange(SIZE)}
    for number in range(ROUNDS):
        tuner.num_rounds = tuner.num_updates = number
        with torch.no_grad():
            experience = tuner.collect(batch, tuner.pipeline.encode(batch))
        terms = experience.terms(torch.arange(experience.num_terms))
        losses, _ = tuner.loss(terms, generators(terms.seeds))
        optimizer.zero_grad()
        (losses.sum() / SIZE).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    return tuner


def points(tuner: RewardFineTuner, eta: float) -> Tensor:
    own = generators(range(10**6, 10**6 + POINTS))
    condition = tuner.pipeline.encode({"index": torch.arange(POINTS)})
    with torch.no_grad():
        x_1 = tuner.prior(condition).sample(own)
        args = (tuner.pipeline, tuner.pipeline.process, x_1, condition, own)
        return tensor_of(Sampler(100, eta).sample(*args)).double()


def matching(reward: Reward) -> AdjointMatching:
    settings: dict[str, Any] = {"num_candidates": 1, "num_matched": 8, "sampler": Sampler(40, 1.0)}
    return AdjointMatching(pipeline(), reward, reward_scale=SCALE, **settings)


@pytest.mark.slow
def test_it_reaches_the_tilted_law_where_draft_at_equal_updates_does_not(law: Law) -> None:
    """Within the error of so many samples, under the ancestral sampler and without noise."""
    most, size = max(law.chance), POINTS**0.5
    mean, std = law.exact.mean(dim=0), law.exact.std(dim=0)
    tuner = trained(matching(Coordinate()))
    for eta in (1.0, 0.0):
        x = points(tuner, eta)
        assert law.distance(x) < most
        error = std * 2**0.5 / size  # of the difference of two means
        assert ((x.mean(dim=0) - mean).abs() < 4 * error).all()
        torch.testing.assert_close(x.std(dim=0), std, rtol=0.08, atol=0)
    draft = RewardGradient(pipeline(), Coordinate(), method=DRaFT(1), sampler=Sampler(40))
    assert law.distance(points(trained(draft), 0.0)) > 20 * most


class Shuffled(Reward):
    """The first coordinate, with a sign drawn for each sample: its gradient says nothing."""

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        signs = torch.randint(2, (len(samples),)) * 2 - 1
        return signs.to(samples) * samples[:, 0]


@pytest.mark.slow
def test_a_gradient_of_random_sign_moves_nothing() -> None:
    before = points_of_pretrained()
    gains = [
        float(points(trained(matching(reward)), 0.0)[:, 0].mean() - before[:, 0].mean())
        for reward in (Coordinate(), Shuffled())
    ]
    assert gains[0] > 0.5 and abs(gains[1]) < 0.15


def points_of_pretrained() -> Tensor:
    tuner = matching(Coordinate())
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    return points(tuner, 0.0)
