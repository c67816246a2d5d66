"""What the tests of inverse noise correction share: a biased model, its data, its noise."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.layout.data import LayoutData
from domains.layout.sources import Grammar
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, tensor_of
from tests.support import trainer_of

STEPS = 8

MIXTURE: dict[str, Any] = {
    "weights": [0.5, 0.3, 0.2],
    "means": [[-1.0, 0.0], [0.8, 0.9], [0.6, -1.0]],
    "stds": [0.4, 0.4, 0.4],
}


class Biased(GaussianMixturePipeline):
    """The exact flow plus a field that turns and shifts, most of all where there is most noise."""

    def __init__(self) -> None:
        flow: dict[str, Any] = {"schedule": "rectified_flow", "prediction_type": "velocity"}
        super().__init__(**MIXTURE, **flow, residual_width=0)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        x = tensor_of(x_t)
        turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
        bias = 0.8 * turned + torch.tensor([1.5, -1.0])
        return super().predict(x, t, condition) + t.square().unsqueeze(1).to(x) * bias


def tuner_of(pipeline: Pipeline, reward: Reward | None = None, **settings: Any) -> Any:
    settings = {"sampler": Sampler(STEPS), "width": 16, "shard_size": 8, **settings}
    return InverseNoiseCorrection(pipeline, reward or Coordinate(), **settings)


def fit(tuner: Any, data: Any, folder: Path, num_epochs: int = 1, **trainer: Any) -> Trainer:
    runner = trainer_of(max_epochs=num_epochs, default_root_dir=folder, **trainer)
    runner.fit(tuner, data)
    return runner


def points(num: int = 20, **settings: Any) -> MixtureData:
    return MixtureData(**MIXTURE, num_train=num, batch_size=4, **settings)


def store_of(folder: Path, num: int = 20, shard_size: int = 8) -> InvertedNoise:
    return InvertedNoise(folder / "inverted_noise", num, shard_size)


class MoreBiased(Biased):
    """The same weights, another sampler."""

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return super().predict(x_t, t, condition) + 0.1


def layouts(**settings: Any) -> LayoutData:
    return LayoutData(Grammar(num_pages=40), num_train=8, batch_size=4, **settings)
