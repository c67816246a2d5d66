"""What DDPO refuses or leaves out: bad settings, failed rewards, steps without noise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from tests.algorithms.ddpo_support import NUM, STEPS, collected, pairs_of, replayed, tuner_of


def test_a_step_without_noise_is_sampled_and_not_trained() -> None:
    """It left TRL's weights NaN: its log-probability divides by a std of 0."""
    tuner = tuner_of()
    rollout = collected(tuner)
    assert not rollout.trajectories.log_probs[-1].any() and not rollout.trained[-1].any()
    (part,) = pairs_of(rollout)
    assert set(tensor_of(part.states["t"]).tolist()) == set(
        tuner.pipeline.process.times(STEPS)[: STEPS - 1].tolist()
    )
    assert replayed(tuner, rollout)[0].isfinite().all()
    with pytest.raises(UsageError, match="none of the trained steps has noise"):
        collected(tuner_of(window=(STEPS - 1, STEPS)))


def test_a_round_of_the_score_function_should_be_one_update(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """A second one is of samples that other weights drew, without their ratio."""
    fresh = {"estimator": "score_function"}
    collected(tuner_of(**fresh, minibatch_size=NUM))
    collected(tuner_of(minibatch_size=NUM - 1))
    assert not [warning for warning in recwarn if "score function" in str(warning.message)]
    sentence = rf"{NUM} are 2 updates: set model.init_args.minibatch_size to {NUM} or more"
    with pytest.warns(UserWarning, match=sentence):
        collected(tuner_of(**fresh, minibatch_size=NUM - 1))


class Flaky(Reward):
    """Fails for every third sample, or for all."""

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        failed = torch.arange(len(samples)) % 3 == 0
        return samples[:, 0].masked_fill(failed | self.always, math.nan)


def test_failed_rewards_are_masked_and_counted() -> None:
    tuner = tuner_of(reward=Flaky())
    rollout = collected(tuner)
    assert rollout.metrics["failed_rewards"] == 3 / NUM
    assert math.isfinite(rollout.metrics["reward"])
    (part,) = pairs_of(rollout)
    assert len(part) == 5 * (STEPS - 1)
    assert replayed(tuner, rollout)[0].isfinite().all()
    with pytest.raises(UsageError, match="Flaky failed for all 8 samples"):
        collected(tuner_of(reward=Flaky(always=True)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no noise": ({"sampler": Sampler(4, 0.0)}, r"sampler\.eta must be above 0.*set it to 1"),
    "group of one": ({"advantage": GroupAdvantage(), "num_candidates": 1}, "group of one"),
    "nobody": ({"num_candidates": 0}, "num_candidates must be at least 1"),
    "clip range 0": ({"clip_range": 0.0}, "clip_range must be positive"),
    "clip range": ({"clip_range": -0.1}, "clip_range must be positive"),
    "advantage clip": ({"advantage_clip": 0.0}, "advantage_clip must be positive"),
    "KL": ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
    "empty window": ({"window": (2, 2)}, r"window must be \[first, last\]"),
    "long window": ({"window": (0, 5)}, "last <= 4"),
    "no steps": ({"num_train_steps": 0}, "num_train_steps must be at least 1"),
    "many steps": ({"num_train_steps": 3, "window": (1, 3)}, "the window's 2 steps"),
    "stale": ({"estimator": "score_function", "num_epochs": 2}, "num_epochs must be 1"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_bad_settings(mistake: str) -> None:
    settings, sentence = WRONG[mistake]
    with pytest.raises(UsageError, match=sentence):
        tuner_of(**settings)
