"""Small U-Net folders with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from domains.image.pipeline import ImagePipeline

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture
def tiny_unet() -> Callable[..., UNet2DModel]:
    """Return a function that makes a small network whose predictions depend on all inputs."""

    def make(seed: int = 0, **changes: Any) -> UNet2DModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2DModel(**{**TINY, **changes}).eval()

    return make


@pytest.fixture
def tiny_pipeline(
    tiny_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> Callable[..., ImagePipeline]:
    """Return a function that makes a pipeline of a small network."""

    def make(schedule: str = "rectified_flow", seed: int = 0, **changes: Any) -> ImagePipeline:
        folder = tmp_path / f"unet-{seed}-{len(list(tmp_path.iterdir()))}"
        tiny_unet(seed, **changes).save_pretrained(folder)
        return ImagePipeline(str(folder), schedule=schedule)  # type: ignore[arg-type]

    return make
