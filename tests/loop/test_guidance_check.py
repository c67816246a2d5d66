"""Half a guided prediction's gradient is for reward gradients alone."""

import pytest

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.algorithms.nft import DiffusionNFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.sampling import Sampler


def halved() -> GaussianMixturePipeline:
    pipeline = GaussianMixturePipeline()
    pipeline.guidance_gradient = "conditional"  # type: ignore[assignment]
    return pipeline


@pytest.mark.parametrize("kind", [AdjointMatching, DDPO, DiffusionDPO, DiffusionNFT, GRAFT, PGRAFT])
def test_losses_of_guided_predictions_need_the_gradient_of_both(kind: type) -> None:
    tuner: RewardFineTuner = kind(halved(), Coordinate(), sampler=Sampler(4, float(kind is DDPO)))
    with pytest.raises(UsageError, match=f"guidance_gradient must be both for {tuner.algorithm}"):
        tuner.setup("fit")


def test_others_may_leave_half_of_it_out() -> None:
    four = Sampler(4)
    for tuner in (
        RewardGradient(halved(), Coordinate(), sampler=four, method=DRTune(1, 2)),
        NoisePPO(halved(), Coordinate(), sampler=four),
        GRAFT(halved(), Coordinate(), sampler=four, guided_loss=False),
        DiffusionDPO(halved(), Coordinate(), sampler=four, guided_loss=False),
    ):
        tuner.setup("fit")
