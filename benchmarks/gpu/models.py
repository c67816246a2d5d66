"""Models of the real architectures, or tiny ones, with random weights made on the device."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from benchmarks.gpu.bench import Bench, NotHere
from domains.text_to_image import EMBEDDED
from domains.text_to_image.pipeline import TextToImagePipeline
from tests.domains.text_to_image.families import real_sizes
from tests.domains.text_to_image.families.tiny import tiny

__all__ = ["DENOISERS", "denoiser", "parts_of", "pipeline_of"]


def pipeline_of(
    bench: Bench, family: str, dtype: torch.dtype | None = None, **settings: Any
) -> TextToImagePipeline:
    """Return this project's pipeline of a family, on the device.

    Args:
        bench: Device and size.
        family: "sd" (Stable Diffusion 1.5) or "sdxl".
        dtype: Of the frozen weights; bfloat16 unless given.
        **settings: Of the pipeline.

    Raises:
        NotHere: This version has no such setting.
    """
    known = inspect.signature(TextToImagePipeline.__init__).parameters
    if missing := [name for name in settings if name not in known]:
        raise NotHere(f"this version has no {', '.join(missing)}")
    parts = parts_of(bench, family, dtype)
    key = "frozen_dtype" if "frozen_dtype" in known else "dtype"
    settings |= {key: str(dtype or bench.half).removeprefix("torch.")}
    with patch("domains.text_to_image.pipeline.load_parts", lambda *a, **k: parts):
        pipeline = TextToImagePipeline(family, **settings)
    pipeline.eval().to(bench.device)
    return pipeline


def parts_of(bench: Bench, family: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Return diffusers' pipeline of a family, on the device."""
    made = tiny(family) if bench.tiny else {"sd": _sd, "sdxl": _sdxl}[family](bench.device)
    made.to(bench.device, dtype or bench.half)
    made.set_progress_bar_config(disable=True)
    return made


def denoiser(bench: Bench, family: str) -> nn.Module:
    """Return the denoiser alone of "sdxl", "sd3" (3.5 medium) or "flux", in half precision."""
    if bench.tiny:
        parts = tiny("flux_dev" if family == "flux" else family)
        network: nn.Module = parts.unet if family == "sdxl" else parts.transformer
        return network.to(bench.device, bench.half)
    return _filled(DENOISERS[family], bench.device)


def _sd3() -> nn.Module:
    """The transformer of Stable Diffusion 3.5 medium."""
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def _flux() -> nn.Module:
    """The transformer of FLUX.1-dev, whose sizes are diffusers' defaults."""
    return FluxTransformer2DModel(guidance_embeds=True)


def _sdxl_unet() -> nn.Module:
    with _sdxl_folder() as folder:
        network: nn.Module = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(folder / "unet")
        )
    return network


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "sdxl": _sdxl_unet,
    "sd3": _sd3,
    "flux": _flux,
}
"""Makers of denoisers of the real sizes, by family."""


def _sd(device: torch.device) -> DiffusionPipeline:
    """Return Stable Diffusion 1.5; the U-Net's sizes are diffusers' defaults."""
    return StableDiffusionPipeline(
        vae=_filled(lambda: _vae(512, 0.18215), device),
        text_encoder=_filled(lambda: CLIPTextModel(_clip(768, 12, 12, "quick_gelu")), device),
        tokenizer=_tokenizer(),
        unet=_filled(
            lambda: UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8
            ),
            device,
        ),
        scheduler=DDIMScheduler.from_pretrained(EMBEDDED / "shapes" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(device: torch.device) -> DiffusionPipeline:
    """Return Stable Diffusion XL base 1.0."""
    second = _clip(1280, 32, 20, "gelu")
    with _sdxl_folder() as folder:
        scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return StableDiffusionXLPipeline(
        vae=_filled(lambda: _vae(1024, 0.13025, force_upcast=True), device),
        text_encoder=_filled(lambda: CLIPTextModel(_clip(768, 12, 12, "quick_gelu")), device),
        text_encoder_2=_filled(lambda: CLIPTextModelWithProjection(second), device),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_filled(_sdxl_unet, device),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


@contextmanager
def _sdxl_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cpu"):  # a scheduler's numbers are no part of a network without any
            written = real_sizes.sdxl(Path(folder))
        yield written


def _vae(size: int, scale: float, **settings: Any) -> nn.Module:
    """Return an autoencoder with eight pixels per latent."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=scale,
        **settings,
    )


def _clip(width: int, layers: int, heads: int, act: str) -> CLIPTextConfig:
    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMBEDDED / "shapes" / "tokenizer", model_max_length=77)


@torch.no_grad()
def _filled(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Return a network with small random weights in bfloat16, never held in single precision."""
    with torch.device("meta"):
        network = make().to(torch.bfloat16)
    buffers = {name: _known(name, buffer) for name, buffer in network.named_buffers()}
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    return network.eval().requires_grad_(False)


def _known(name: str, buffer: torch.Tensor) -> torch.Tensor:
    """Return what a buffer holds: places of tokens, or zeros where its values cost the same."""
    if name.endswith("position_ids"):
        return torch.arange(buffer.numel()).view(buffer.shape)
    return torch.zeros(buffer.shape, dtype=buffer.dtype)
