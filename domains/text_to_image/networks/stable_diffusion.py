"""Stable Diffusion folders: read, and checked once for all that `TextToImagePipeline` supplies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from domains.text_to_image import EMBEDDED
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import found_variant, load_pretrained
from lit_rlft.kit.shapes import output_shape

__all__ = ["check_shapes", "load_stable_diffusion"]

_KEY = "pipeline.init_args.pretrained"
# Pipelines of the same parts, used in the same way to generate pictures from prompts alone.
_KINDS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WEIGHED = _PARTS[:3]


def load_stable_diffusion(
    pretrained: str, *, variant: str | None = None, from_scratch: bool = False
) -> StableDiffusionPipeline:
    """Load a pipeline in single precision and check that prompts and noise are all it needs.

    Args:
        pretrained: A folder saved by diffusers, a hub id, or the name of an embedded model.
        variant: Which files of weights, such as "fp16"; None takes plain ones, and where a folder
            has none the one variant that is there.
        from_scratch: Draw new weights for U-Net and text encoder.

    Raises:
        UsageError: It cannot be loaded, is of another family, or needs other inputs.
    """
    loaded = load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: _read(source, variant, from_scratch),
        kind="a StableDiffusionPipeline",
        give="'shapes', a folder that save_pretrained wrote or a hub id",
    )
    if problem := next(_problems(loaded), None):
        raise UsageError(
            f"{_KEY}: {pretrained!r} is not supported: {problem}; give a text-to-image model of "
            "the kind of SD 1.x or 2.x"
        )
    for name in _WEIGHED:
        getattr(loaded, name).float()
    return loaded


def check_shapes(loaded: StableDiffusionPipeline, size: tuple[int, int]) -> None:
    """Rehearse one prediction and its decoding; only shapes are computed.

    Args:
        loaded: The pipeline.
        size: Height and width of its latents.

    Raises:
        UsageError: The parts do not fit each other, or not this size.
    """
    config, factor = loaded.unet.config, loaded.vae_scale_factor
    latents = (1, config["in_channels"], *size)
    text = (1, loaded.tokenizer.model_max_length, loaded.text_encoder.config.hidden_size)
    pictures = (1, 3, factor * size[0], factor * size[1])
    timestep = torch.zeros(1, dtype=torch.int64)
    for name, network, inputs, expected in (
        ("U-Net", loaded.unet, (latents, timestep, text), latents),
        ("VAE", _Decoder(loaded.vae), (latents,), pictures),
    ):
        sentence = f"{_KEY}: the {name} of {loaded.name_or_path!r} does not fit its other parts"
        shape = output_shape(network, *inputs, sentence=sentence)
        if shape is not None and tuple(shape) != expected:
            raise UsageError(
                f"{sentence}: it returns {list(shape)} where {list(expected)} are needed"
            )


class _Decoder(nn.Module):
    """What a VAE does in `TextToImagePipeline.decode`."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W]."""
        return self.vae.decode(latents).sample


def _read(source: str, variant: str | None, from_scratch: bool) -> StableDiffusionPipeline:
    folder = Path(source)
    if folder.is_file():
        raise UsageError(
            f"{_KEY}: {folder} is a single file; make a folder of it with diffusers: "
            f"StableDiffusionPipeline.from_single_file({source!r}).save_pretrained('folder')"
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{_KEY}: {folder} has no model_index.json, so it is no "
            "diffusers pipeline; give a folder written by save_pretrained or a hub id"
        )
    index = StableDiffusionPipeline.load_config(source)
    kind = index.get("_class_name", _KINDS[0])
    if kind not in _KINDS:
        raise UsageError(
            f"{_KEY}: {source!r} is a {kind}, which is not supported; give a "
            "StableDiffusionPipeline of the kind of SD 1.x or 2.x"
        )
    # diffusers stops at such a part, with a sentence about its own arguments.
    absent = [name for name in _PARTS if index.get(name) in (None, [None, None])]
    if absent:
        raise UsageError(
            f"{_KEY}: {source!r} is not supported: it has no {' and no '.join(absent)}; give a "
            "text-to-image model of the kind of SD 1.x or 2.x"
        )
    if variant is None and folder.is_dir():
        variant = found_variant(folder, _WEIGHED)
    fresh: dict[str, Any] = {}
    if from_scratch:
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
        fresh["unet"] = UNet2DConditionModel.from_config(unet)
        text = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
        fresh["text_encoder"] = CLIPTextModel(text)
    return StableDiffusionPipeline.from_pretrained(
        source, safety_checker=None, variant=variant, **fresh
    )


def _problems(loaded: StableDiffusionPipeline) -> Iterator[str]:
    """Iterate over what is not supported, in words."""
    if not isinstance(loaded.unet, UNet2DConditionModel):
        yield f"its U-Net is a {type(loaded.unet).__name__}, not a UNet2DConditionModel"
    yield from _inputs(loaded.unet)
    yield from _text(loaded)
    yield from _latents(loaded)


def _inputs(unet: UNet2DConditionModel) -> Iterator[str]:
    """Iterate over what else than latents, timesteps and text a U-Net has to be given."""
    config = unet.config
    added = config["addition_embed_type"]
    if added not in (None, "text"):
        family = ", as SDXL's has" if added == "text_time" else ""
        yield f"its U-Net has added conditions{family} (addition_embed_type {added!r})"
    projected = config["encoder_hid_dim_type"]
    if projected not in (None, "text_proj"):
        yield f"its U-Net needs embeddings of images (encoder_hid_dim_type {projected!r})"
    if unet.class_embedding is not None:
        found = {name: config[name] for name in ("class_embed_type", "num_class_embeds")}
        given = ", ".join(f"{name} {value!r}" for name, value in found.items() if value is not None)
        yield f"its U-Net is conditioned on classes ({given})"
    if config["time_cond_proj_dim"] is not None:
        yield (
            "its U-Net is given the guidance scale, as latent consistency models are "
            f"(time_cond_proj_dim {config['time_cond_proj_dim']})"
        )
    if config["dual_cross_attention"]:
        yield "its U-Net attends to text and images (dual_cross_attention)"


def _text(loaded: StableDiffusionPipeline) -> Iterator[str]:
    """Iterate over what does not fit in tokenizer, text encoder and the U-Net's attention."""
    encoder, tokenizer, config = loaded.text_encoder, loaded.tokenizer, loaded.unet.config
    if not isinstance(encoder, CLIPTextModel):
        yield f"its text encoder is a {type(encoder).__name__}, not a CLIPTextModel"
    own = encoder.config
    if not 2 < len(tokenizer) <= own.vocab_size:
        yield (
            f"its tokenizer has {len(tokenizer)} tokens, its text encoder {own.vocab_size}; they "
            "must be of one model"
        )
    if tokenizer.model_max_length > own.max_position_embeddings:
        yield (
            f"its tokenizer's model_max_length {tokenizer.model_max_length} exceeds the "
            f"{own.max_position_embeddings} positions of its text encoder"
        )
    by_text = config["encoder_hid_dim_type"] == "text_proj"
    widths = config["encoder_hid_dim" if by_text else "cross_attention_dim"]
    for width in widths if isinstance(widths, list | tuple) else [widths]:
        if width != own.hidden_size:
            yield (
                f"its U-Net attends to text features of {width} numbers, its text encoder makes "
                f"{own.hidden_size}"
            )


def _latents(loaded: StableDiffusionPipeline) -> Iterator[str]:
    """Iterate over what does not fit in the U-Net's and the VAE's latents."""
    vae, config = loaded.vae, loaded.unet.config
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        yield f"its VAE is a {type(vae).__name__}, not an AutoencoderKL or AutoencoderTiny"
    own, read = vae.config, config["in_channels"]
    if read != own["latent_channels"]:
        yield (
            f"its U-Net reads {read} channels and its VAE has {own['latent_channels']}, so that it "
            "needs a picture or mask beside the noise, as for inpainting, depth or editing"
        )
    if config["out_channels"] != read:
        yield f"its U-Net returns {config['out_channels']} channels of {read}"
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if own.get(name):
            yield f"its VAE has a {name}, which a StableDiffusionPipeline leaves out"
    if not own.get("scaling_factor"):
        yield "its VAE has no scaling_factor"
    for name in ("in_channels", "out_channels"):
        if own[name] != 3:
            yield f"its VAE is for pictures of {own[name]} channels, not 3 ({name})"
