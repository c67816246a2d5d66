"""Gradients of a reward move pages; gradients of random signs, as many and as large, do not."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.layout.data import LayoutData
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Coverage
from domains.layout.sources import Grammar
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.data import collate
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.route import Route
from tests.support import trainer_of

NUM_PAGES, ROUND, ROUNDS = 512, 64, 12
LEARNERS: dict[str, tuple[type[RewardFineTuner], dict[str, Any]]] = {
    "DRTune": (RewardGradient, {"method": DRTune(k=2, m=5), "sampler": Sampler(10, 0.0)}),
    "adjoint matching": (
        AdjointMatching,
        {"reward_scale": 30.0, "num_candidates": 1, "sampler": Sampler(10, 1.0)},
    ),
}


class RandomSigns(Reward):
    """Coverage, or its negative: what it says of a page is 0 on average."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.coverage, self.coins = Coverage(), torch.Generator().manual_seed(0)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        value = self.coverage(samples, condition)
        return value * (2.0 * torch.randint(2, value.shape, generator=self.coins) - 1.0)


def gains(learner: str, reward: Reward) -> Tensor:
    """Return how much more of the page the same draws cover after a few rounds, [NUM_PAGES]."""
    kind, settings = LEARNERS[learner]
    tuner = kind(
        LayoutPipeline("grammar"),
        reward,
        lora=LoRA(8, 8),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0),
        minibatch_size=32,
        **settings,
    )
    data = LayoutData(Grammar(ROUNDS * ROUND), num_val=4, num_test=4, batch_size=ROUND)
    trainer_of(limit_train_batches=ROUNDS - 1).fit(tuner, data)
    pipeline, rows = tuner.pipeline, data.rows("train")
    condition = pipeline.encode(collate([rows[i] for i in range(NUM_PAGES)]))

    def covered(route: Route) -> Tensor:
        (x_0,) = tuner.rollouts.draw(route, condition, range(NUM_PAGES), keep=[route.num_steps])
        return Coverage()(pipeline.decode(x_0, condition), condition)

    with torch.no_grad():
        return covered(tuner.route()) - covered(tuner.reference_route())


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_learns_and_its_control_does_not(learner: str) -> None:
    learned, control = (gains(learner, reward) for reward in (Coverage(), RandomSigns()))
    error = learned.std() / NUM_PAGES**0.5
    assert learned.mean() > 0.05 and learned.mean() > 5 * error
    assert control.mean() < 0.04
