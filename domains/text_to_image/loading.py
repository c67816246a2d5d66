"""Loads a text-to-image model as its family, from a folder, by an embedded name or a hub id."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from domains.text_to_image import EMBEDDED
from domains.text_to_image.families import FAMILIES
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import load_pretrained

__all__ = ["load_parts"]

_KEY = "pipeline.init_args.pretrained"
_LEFT_OUT = {
    "StableDiffusionPipeline": {"safety_checker": None},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""What diffusers would add to a picture, or refuse one for; rewards are to see the model's own."""


def load_parts(pretrained: str, dtype: torch.dtype, *, from_scratch: bool) -> DiffusionPipeline:
    """Return the pipeline of diffusers that `pretrained` names.

    Args:
        pretrained: A folder, an embedded model's name or a hub id.
        dtype: Precision of all weights; a VAE that overflows in half precision stays in single.
        from_scratch: Draw new weights for U-Net and text encoder.

    Raises:
        UsageError: It cannot be loaded, or it is of a family that is not known here.
    """
    parts = load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: _read(source, dtype, from_scratch),
        kind="a text-to-image model",
        give="'shapes', a folder that save_pretrained wrote or a hub id",
    )
    if dtype == torch.float16 and parts.vae.config.get("force_upcast"):
        parts.vae.float()
    return parts


def _read(source: str, dtype: torch.dtype, from_scratch: bool) -> DiffusionPipeline:
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{_KEY}: {folder} has no model_index.json, so it is no diffusers pipeline; give a "
            "folder written by save_pretrained or a hub id"
        )
    kind = DiffusionPipeline.load_config(source)["_class_name"]
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UsageError(f"{_KEY}: {source} is a {kind}, which is not supported; known: {known}")
    new: dict[str, Any] = _new_networks(source, kind) if from_scratch else {}
    with warnings.catch_warnings():
        # Older versions know this name of it alone.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        loaded = getattr(diffusers, kind).from_pretrained(
            source, torch_dtype=dtype, **_LEFT_OUT.get(kind, {}), **new
        )
    assert isinstance(loaded, DiffusionPipeline)
    return loaded


def _new_networks(source: str, kind: str) -> dict[str, Any]:
    if kind != "StableDiffusionPipeline":
        raise UsageError(
            "pipeline.init_args.from_scratch is for Stable Diffusion 1.x/2.x, not for a "
            f"{kind}; set it to false"
        )
    unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    text = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
    return {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}
