"""A LoRA as web interfaces read it: AUTOMATIC1111, Forge, ComfyUI."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from domains.text_to_image.networks.lora import Home

__all__ = ["WEB_LORA", "save_web_lora"]

WEB_LORA = "web_lora.safetensors"

_WIDTH_OF_V2 = 1024
_ARCHITECTURES = {
    "StableDiffusionXLPipeline": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "StableDiffusion3Pipeline": ("sd3", "stable-diffusion-3"),
    "FluxPipeline": ("flux1", "flux-1-dev"),
    "ZImagePipeline": ("z_image", "Z-Image"),
}
"""Base model as kohya's scripts and as Stability's model specification name it."""


def save_web_lora(
    weights: Mapping[str, Tensor], rank: int, alpha: float, home: Home, path: Path, title: str
) -> Path:
    """Write a LoRA for web interfaces; return the file.

    U-Nets have kohya's names, such as lora_unet_mid_block_attentions_0_proj_in.lora_down.weight,
    and an alpha per layer. Transformers have diffusers' names, which ComfyUI and Forge take. Not
    all readers take alphas there, so these weights are multiplied by alpha / rank.

    Args:
        weights: By peft's names, such as mid_block.attentions.0.proj_in.lora_A.weight.
        rank: Its rank.
        alpha: Its alpha.
        home: The denoiser it belongs to.
        path: Where to.
        title: What the interfaces show.
    """
    if home.name == "unet":
        named = convert_state_dict_to_kohya({f"unet.{n}": value for n, value in weights.items()})
        for name in [name for name in named if name.endswith(".alpha")]:
            named[name] = torch.tensor(float(alpha))
    else:
        scale = alpha / rank
        named = {
            f"{home.name}.{n}": value * scale if ".lora_B." in n else value
            for n, value in weights.items()
        }
        alpha = rank
    whole = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(whole, path, _metadata(rank, alpha, home, title))
    return path


def _metadata(rank: int, alpha: float, home: Home, title: str) -> dict[str, str]:
    """Return what interfaces read: of kohya's scripts, and of Stability's specification."""
    version, architecture = _ARCHITECTURES.get(home.kind.__name__, ("sd_v1", "stable-diffusion-v1"))
    if version == "sd_v1" and home.config.get("cross_attention_dim") == _WIDTH_OF_V2:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": version,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
    }
