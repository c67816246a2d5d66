"""What the tests of noise PPO share: a model that is affine in its noise, and its tuners."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.core.advantage import Advantage
from lit_rlft.core.prior import FullResolution, LowRank, LowResolution, Maps
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.experience import Experience
from tests.support import trainer_of

MAPS: dict[str, Maps] = {
    "full": FullResolution(),
    "low resolution": LowResolution(2),
    "low rank": LowRank(3),
}

each_maps = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)

Tiny = Callable[..., Path]


class Raw(Advantage):
    """Rewards themselves, less a constant, so that gradients are those of E[r]."""

    def __init__(self, scale: float = 1.0, baseline: float = 0.0) -> None:
        self.scale, self.baseline = scale, baseline

    def peers(self, rewards: Tensor, conditions: Sequence[str]) -> list[Tensor]:
        return []

    def __call__(
        self, rewards: Tensor, conditions: Sequence[str], clip: float | None = None
    ) -> Tensor:
        return self.scale * (rewards.double() - self.baseline)


def one_gaussian(**settings: Any) -> GaussianMixturePipeline:
    return GaussianMixturePipeline([1.0], [[0.5, -0.25]], [0.6], residual_width=0, **settings)


def tuner_of(reward: Reward | None = None, pipeline: Any = None, **settings: Any) -> NoisePPO:
    base: dict[str, Any] = {"sampler": Sampler(3), "width": 16, "maps": FullResolution()}
    return NoisePPO(pipeline or one_gaussian(), reward or Coordinate(), **{**base, **settings})


def ready(*args: Any, **settings: Any) -> NoisePPO:
    """A tuner that can collect and compute losses outside of a fit."""
    tuner = tuner_of(*args, **settings)
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    return tuner


@torch.no_grad()
def collected(tuner: NoisePPO, num_conditions: int = 4) -> Experience:
    batch = {"index": torch.arange(num_conditions)}
    return tuner.collect(batch, tuner.pipeline.encode(batch))


@torch.no_grad()
def disturb(policy: nn.Module, std: float = 0.3) -> None:
    """Leave the start: no weight is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def affine(tuner: NoisePPO) -> tuple[float, Tensor]:
    """a and b of x_0 = a x_1 + b, measured; fails where the sampler is not affine."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    condition = tuner.pipeline.encode({"index": torch.arange(3)})
    pipeline = tuner.pipeline
    x_0 = tensor_of(tuner.sampler.sample(pipeline, pipeline.process, points, condition))
    a, b = float(x_0[1, 0] - x_0[0, 0]), x_0[0]
    torch.testing.assert_close(x_0, a * points + b)
    return a, b


def pictures(tiny: Path, folder: Path) -> tuple[TextToImagePipeline, PromptData]:
    pipeline = TextToImagePipeline(str(tiny), guidance_scale=2.0)
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a ring\na star\na red cross\na blue ring\na circle\ntwo")
    splits = {"num_test_prompts": 1, "num_val_prompts": 1}
    return pipeline, PromptData(str(folder / "prompts.txt"), batch_size=2, **splits)


def painted(tiny: Path, folder: Path, **settings: Any) -> NoisePPO:
    """A fit of two rounds on a tiny diffusion model."""
    pipeline, data = pictures(tiny, folder)
    settings = {"num_candidates": 4, "maps": LowResolution(2), **settings}
    optimizer = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}
    tuner = tuner_of(Symmetry(), pipeline, **optimizer, **settings)
    trainer_of(max_epochs=1, default_root_dir=folder).fit(tuner, data)
    assert tuner.num_updates
    return tuner
