"""Every round of each algorithm draws noise of its own."""

from typing import Any

import pytest
import torch

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.nft import DiffusionNFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.sampling import Sampler
from tests.support import trainer_of

KINDS: dict[type[RewardFineTuner], dict[str, Any]] = {
    AdjointMatching: {},
    DDPO: {"sampler": Sampler(3, 1.0)},
    DiffusionDPO: {},
    DiffusionNFT: {},
    GRAFT: {},
    NoisePPO: {},
    RewardGradient: {"method": DRaFT(), "num_epochs": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_round_has_seeds_of_its_own(kind: type[RewardFineTuner]) -> None:
    """Other ones than evaluations have, and the same ones again for a round that is repeated.

    Samples are counted where they are scored; reward gradients draw theirs in each epoch's loss.
    """
    settings = {"sampler": Sampler(3), **KINDS[kind]}
    tuner = kind(GaussianMixturePipeline(residual_width=4), Coordinate(), **settings)
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    batch = {"index": torch.arange(4)}
    condition = tuner.pipeline.encode(batch)
    drawn = []
    for tuner.num_rounds in (0, 1, 0):
        with torch.no_grad():
            drawn.append(set(tuner.collect(batch, condition).seeds))
    _, evaluated = tuner.evaluator._conditions(batch)
    assert drawn[0] == drawn[2] and drawn[0].isdisjoint(drawn[1])
    assert drawn[0].isdisjoint(evaluated) and drawn[1].isdisjoint(evaluated)
    scored = 3 * 4 * 2 if kind is RewardGradient else tuner.meter.current.reward_calls
    assert tuner.num_samples == scored > 0
