"""Families that are tuned: LoRA files, frozen weights in half precision, gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from domains.text_to_image.families import FAMILIES
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import tiny

SLOW = pytest.mark.slow
FAMILY_NAMES = [
    "sdxl",
    "sd3",
    "flux_dev",
    *(pytest.param(name, marks=SLOW) for name in ("klein", "zimage", "sana")),
]
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model of a family."""
    path = tmp_path_factory.mktemp("family") / request.param
    tiny(request.param).save_pretrained(path)
    return path


def perturbed(pipeline: TextToImagePipeline) -> TextToImagePipeline:
    """Return the pipeline with a LoRA that changes something."""
    adapt(pipeline, LoRA(rank=2, alpha=3), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def latents(pipeline: TextToImagePipeline, num_steps: int = 2) -> Tensor:
    """Sample latents of one prompt."""
    condition = pipeline.encode({"prompt": ["a red ring"]})
    blank = pipeline.blank(condition)
    z = torch.randn(blank.shape, generator=torch.Generator().manual_seed(2)).to(blank)
    with torch.no_grad():
        return Sampler(num_steps=num_steps).sample(pipeline, pipeline.process, z, condition)


def test_a_lora_goes_to_diffusers_and_back(folder: Path, tmp_path: Path) -> None:
    tuned = perturbed(TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE))
    expected = latents(tuned)
    (file,) = tuned.save(tmp_path / "tuned")

    plain = TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE)
    before = latents(plain)
    assert (before - expected).abs().max() > 0.01
    plain.diffusers.load_lora_weights(file.parent)  # the other program's reader
    torch.testing.assert_close(latents(plain), expected, atol=1e-5, rtol=1e-4)
    plain.diffusers.disable_lora()
    torch.testing.assert_close(latents(plain), before)

    again = TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE)
    adapt(again, LoRA(rank=2, alpha=3, pretrained=str(file.parent)), seed=5)
    torch.testing.assert_close(latents(again), expected, atol=1e-5, rtol=1e-4)


def test_frozen_weights_in_half_precision_leave_states_and_lora_in_single(folder: Path) -> None:
    pipeline = perturbed(TextToImagePipeline(str(folder), frozen_dtype="bfloat16", **SIZE))
    trained = {p.dtype for p in pipeline.denoiser.parameters() if p.requires_grad}
    frozen = {p.dtype for p in pipeline.denoiser.parameters() if not p.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16}
    x = latents(pipeline)
    assert x.dtype == torch.float32
    exact = latents(perturbed(TextToImagePipeline(str(folder), **SIZE)))
    # bfloat16 has 8 bits: states are off by a few thousandths of their size after two steps.
    assert (x - exact).norm() < 0.03 * exact.norm()
    picture = pipeline.decode(x, pipeline.example())
    assert picture.dtype == torch.float32 and bool(picture.isfinite().all())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_picture_reach_the_lora(folder: Path, checkpointed: bool) -> None:
    pipeline = TextToImagePipeline(
        str(folder), checkpoint_denoiser=checkpointed, guidance_scale=2.0, **SIZE
    ).double()
    adapt(pipeline, LoRA(rank=2, alpha=2), seed=0)
    pipeline.train(checkpointed)  # blocks are computed again in training mode alone
    condition = pipeline.encode({"prompt": ["a red ring"]})
    blank = pipeline.blank(condition)
    z = torch.randn(blank.shape, generator=torch.Generator().manual_seed(2)).to(blank)
    weights = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
    for weight in weights:
        weight.data.fill_(0.02)

    def brightness() -> Tensor:
        x = Sampler(num_steps=2).sample(pipeline, pipeline.process, z, condition)
        return pipeline.vae.decode(pipeline.family.to_vae(x)).sample.mean()

    brightness().backward()
    directions = [weight.grad.clone() for weight in weights if weight.grad is not None]
    assert len(directions) == len(weights)
    norm = torch.stack([d.square().sum() for d in directions]).sum().sqrt()
    ends = []
    with torch.no_grad():  # along the gradient: parts of FLUX are in single precision
        for step in (1e-3, -2e-3):
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction / norm
            ends.append(brightness())
    assert float(ends[0] - ends[1]) / 2e-3 == pytest.approx(float(norm), rel=2e-3)


def test_every_family_has_its_pipeline_in_diffusers() -> None:
    import diffusers

    for name, family in FAMILIES.items():
        assert hasattr(diffusers, name) and family.pipeline_class == name
