"""The order of numbers in memory changes no picture, and transformers refuse the switch."""

from pathlib import Path

import pytest
import torch

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import tiny


def written(name: str, folder: Path) -> str:
    """Write a tiny model and return its path."""
    tiny(name).save_pretrained(folder / name)
    return str(folder / name)


@torch.no_grad()
def pictures(pipeline: TextToImagePipeline) -> torch.Tensor:
    """Sample with a LoRA that does nothing yet."""
    adapt(pipeline, LoRA(rank=2), seed=0)
    condition = pipeline.encode({"prompt": ["a red ring"]})
    blank = pipeline.blank(condition)
    z = torch.randn(blank.shape, generator=torch.Generator().manual_seed(2)).to(blank)
    x_0 = Sampler(num_steps=2).sample(pipeline, pipeline.process, z, condition)
    return pipeline.decode(x_0, condition)


def test_channels_last_changes_no_picture_of_a_unet(tmp_path: Path) -> None:
    path = written("sd", tmp_path)
    plain, other = (TextToImagePipeline(path, channels_last=last) for last in (False, True))
    weight = other.denoiser.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert plain.denoiser.conv_in.weight.is_contiguous()
    weight = other.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(pictures(other), pictures(plain), atol=1e-5, rtol=1e-4)


def test_transformers_refuse_channels_last(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"channels_last must be false: Stable Diffusion 3"):
        TextToImagePipeline(written("sd3", tmp_path), channels_last=True, height=32, width=32)
