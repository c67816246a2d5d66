"""What noise PPO leaves alone: first ratios of 1, the denoiser, the reference and its noise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.advantage import RunningAdvantage
from lit_rlft.core.prior import LowResolution
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.core.streams import Stream
from tests.algorithms.noise_ppo_support import Tiny, affine, collected, disturb, painted, ready
from tests.support import assert_equal


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("moved", "heads"), [(False, 0), (True, 0), (True, 2)])
def test_the_first_ratio_is_one(
    tiny_stable_diffusion: Tiny, reduction: Any, moved: bool, heads: int
) -> None:
    """Exactly at equal batch shape, below 1e-6 at any other."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=1.0)
    settings = {"sampler": Sampler(1), "num_candidates": 4, "log_prob_reduction": reduction}
    settings["attention_heads"] = heads
    tuner = ready(Symmetry(), pipeline, maps=LowResolution(2), width=64, **settings)
    if moved:
        disturb(tuner.trainable(), 0.03)
    batch = {"index": torch.arange(3), "prompt": ["a red ring", "a star", "two blue stars"]}
    with torch.no_grad():
        experience = tuner.collect(batch, pipeline.encode(batch))
    values = tuner.loss(experience, None)[1]
    assert float(values["ratio_deviation"].max()) == 0
    assert float(values["first_ratio_deviation_max"].max()) == 0
    assert torch.equal(values["clip_fraction"], torch.zeros(12, dtype=torch.float64))
    for row in range(12):
        part = experience.terms(torch.tensor([row]))
        assert float(tuner.loss(part, None)[1]["ratio_deviation"]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half = tuner.loss(experience, None)[1]
    assert float(half["ratio_deviation"].max()) < 1e-4


def test_nothing_but_the_policy_changes(tiny_stable_diffusion: Tiny, tmp_path: Path) -> None:
    before = TextToImagePipeline(str(tiny_stable_diffusion())).state_dict()
    tuner = painted(tiny_stable_diffusion(), tmp_path)
    after = tuner.pipeline.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.numpy().tobytes() == after[name].numpy().tobytes(), name
    assert not any(parameter.requires_grad for parameter in tuner.pipeline.parameters())
    # The frozen denoiser is its own reference: no second copy is held.
    assert tuner.reference is not None and tuner.reference.frozen is None
    tuner.trainer.save_checkpoint(tmp_path / "file.ckpt")
    held = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]
    own = {f"noise_policy.{name}" for name, _ in tuner.trainable().named_parameters()}
    assert set(held) == own


def test_full_fine_tuning_still_has_a_frozen_reference() -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate())
    tuner.setup("fit")
    assert tuner.reference is not None and tuner.reference.frozen is not None


def test_tuned_and_reference_start_from_the_same_noise() -> None:
    tuner = ready(num_eval_samples=3)
    batch = {"index": torch.arange(2)}
    condition, steps = tuner.pipeline.encode(batch).repeat(3), tuner.sampler.num_steps
    seeds = tuner.rollouts.seeds(batch, 3, Stream.EVALUATE)

    def drawn() -> list[Tensor]:
        with torch.no_grad():
            return [
                tensor_of(tuner.rollouts.draw(route, condition, seeds, keep=[steps])[0])
                for route in (tuner.route(), tuner.reference_route())
            ]

    tuned, reference = drawn()
    assert torch.equal(tuned, reference)
    bias = tuner.trainable().head[0].bias
    with torch.no_grad():
        bias.copy_(torch.tensor([0.5, -0.25, math.log(2), 0.0]))
    moved, unmoved = drawn()
    assert torch.equal(unmoved, reference)
    a, b = affine(tuner)
    e = (reference - b) / a
    x_1 = torch.tensor([0.5, -0.25]) + torch.tensor([2.0, 1.0]) * e
    torch.testing.assert_close(moved, a * x_1 + b)


def test_running_statistics_travel_with_checkpoints() -> None:
    first = ready(advantage=RunningAdvantage(8, 2), num_candidates=4)
    collected(first)
    checkpoint: dict[str, Any] = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    second = ready(advantage=RunningAdvantage(8, 2), num_candidates=4)
    second.on_load_checkpoint(checkpoint)
    assert len(first.advantage.state_dict()["rewards"])
    assert_equal(second.advantage.state_dict(), first.advantage.state_dict())
    assert all(isinstance(v, Tensor) for v in checkpoint["lit_rlft"]["advantage"].values())
