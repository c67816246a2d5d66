"""What the tests of GRAFT and P-GRAFT share: a reward per mode, fits that keep what they saw."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import MEANS, WEIGHTS
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, tensor_of
from lit_rlft.loop.experience import Experience
from tests.support import trainer_of

W, M = np.array(WEIGHTS), np.array(MEANS)

VALUES = (1.0, 0.0, 1.0, 2.0, 2.0)

NUM_CONDITIONS, NUM_CANDIDATES, NUM_SAMPLES = 2048, 2, 4096


class Guided(GaussianMixturePipeline):
    """Samples from another prediction than the denoiser's own, as pipelines with guidance do."""

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> State:
        return 1.5 * tensor_of(self.predict(x_t, t, condition))


class ModeValue(Reward):
    """A value per mode, that of the mode nearest to the sample."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.tensor(VALUES)[nearest(samples)]


@dataclass
class Run:
    """A finished fit: the tuner, what it collected, and the mixture's weights before each round."""

    tuner: PGRAFT
    experiences: list[Experience] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)

    @property
    def learned(self) -> np.ndarray:
        return weights_of(self.tuner)


def nearest(points: State) -> Tensor:
    assert isinstance(points, Tensor)
    return torch.cdist(points.detach().double(), torch.from_numpy(M)).argmin(dim=1)


def weights_of(tuner: PGRAFT) -> np.ndarray:
    assert isinstance(tuner.pipeline, GaussianMixturePipeline)
    return tuner.pipeline.denoiser.mixture.weights.double().numpy()


def tuner_of(cls: type[PGRAFT] = PGRAFT, *, width: int = 0, **settings: Any) -> PGRAFT:
    pipeline = GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity", residual_width=width
    )
    base: dict[str, Any] = {"sampler": Sampler(8), "num_candidates": 4, "minibatch_size": 4}
    return cls(pipeline, settings.pop("reward", ModeValue()), **{**base, **settings})


def fit(tuner: PGRAFT, num_conditions: int = 8, num_rounds: int = 1, **trainer: Any) -> Run:
    run, collect = Run(tuner), tuner.collect

    def recorded(*args: Any) -> Experience:
        run.weights.append(weights_of(tuner))
        run.experiences.append(collect(*args))
        return run.experiences[-1]

    tuner.collect = recorded  # type: ignore[method-assign]
    data = MixtureData(num_train=num_conditions, batch_size=num_conditions)
    trainer_of(max_epochs=num_rounds, **trainer).fit(tuner, data)
    return run


@torch.no_grad()
def drawn(tuner: PGRAFT, num: int = NUM_SAMPLES) -> Tensor:
    """New x_0 of the tuned model: the policy above the cut, the reference below."""
    condition = tuner.pipeline.encode({"index": torch.arange(num)})
    keep, seeds = [tuner.sampler.num_steps], range(10**6, 10**6 + num)
    (x_0,) = tuner.rollouts.draw(tuner.route(), condition, seeds, keep=keep)
    assert isinstance(x_0, Tensor)
    return x_0
