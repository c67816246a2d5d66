"""What noise PPO refuses at start-up, and rewards that fail."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.core.advantage import BatchAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.prior import LowRank, LowResolution
from lit_rlft.core.process import MaskedProcess, ProductProcess
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.reference import LoRA
from tests.algorithms.noise_ppo_support import collected, ready, tuner_of


class Patchy(Coordinate):
    """Fails for samples to the left of `edge`."""

    edge = 0.0

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 0].where(samples[:, 0] > self.edge, torch.nan)


def test_failed_rewards_are_left_out_and_counted() -> None:
    reward = Patchy()
    tuner = ready(reward, num_candidates=64, advantage=BatchAdvantage())
    experience = collected(tuner)
    failed = experience.metrics["failed_rewards"]
    assert 0.1 < failed < 0.5
    advantages = tensor_of(experience.states["advantage"])
    assert float((advantages == 0).double().mean()) == failed
    assert advantages.isfinite().all() and math.isfinite(experience.metrics["reward"])
    assert tuner.loss(experience, None)[0].isfinite().all()
    reward.edge = math.inf
    with pytest.raises(UsageError, match="Patchy failed for all 256 samples"):
        collected(tuner)


class Masked(GaussianMixturePipeline):
    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "stochastic sampler": ({"sampler": Sampler(3, 1.0)}, "sampler.eta must be 0.*ddpo.yaml"),
    "adapter": ({"lora": LoRA()}, "lora must be null: NoisePPO leaves the denoiser as it is"),
    "group of one": ({"num_candidates": 1}, "a group of one has no peers"),
    "no candidates": ({"num_candidates": 0, "advantage": BatchAdvantage()}, "num_candidates must"),
    "clip range": ({"clip_range": 0.0}, "clip_range must be positive"),
    "advantage clip": ({"advantage_clip": 0.0}, "advantage_clip must be positive"),
    "beta": ({"beta": -1.0}, "beta must be at least 0"),
    "width": ({"width": 0}, "width must be at least 1"),
    "heads": ({"attention_heads": -1}, "attention_heads must be at least 0"),
    "masked process": (
        {"pipeline": Masked(MaskedProcess(3))},
        "learns a Gaussian prior, but Masked.*MaskedProcess; use configs/algorithms/ddpo.yaml",
    ),
    "product process": (
        {"pipeline": Masked(ProductProcess({"a": MaskedProcess(3)}))},
        "ProductProcess; use configs/algorithms/ddpo.yaml",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_work_is_refused_at_start_up(mistake: str) -> None:
    settings, sentence = MISTAKES[mistake]
    with pytest.raises(UsageError, match=sentence):
        tuner_of(**settings).setup("fit")


def test_maps_without_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"LowResolution: size must be at least 1"):
        LowResolution(0)
    with pytest.raises(UsageError, match=r"LowRank: rank must be at least 1"):
        LowRank(0)


def test_states_of_several_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = ready()
    monkeypatch.setattr(tuner.pipeline, "blank", lambda condition: torch.empty(len(condition), 3))
    with pytest.raises(UsageError, match=r"needs states of one size.*\(2,\) and \(3,\)"):
        tuner.prior(tuner.pipeline.example())
