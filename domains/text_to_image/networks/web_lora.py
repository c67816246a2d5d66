"""A LoRA as web interfaces read it: AUTOMATIC1111, Forge, ComfyUI."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from domains.text_to_image.networks.flux2_names import original_lora, without_original
from domains.text_to_image.networks.lora import Home
from lit_rlft.core.checks import UsageError

__all__ = ["WEB_LORA", "check_layers", "save_web_lora", "unread_layers"]

WEB_LORA = "web_lora.safetensors"

_WIDTH_OF_V2 = 1024
_WIDTH_OF_9B = 12288
_KLEIN = "Flux2KleinPipeline"


@dataclass(frozen=True)
class _Base:
    """A base model, by its names in metadata.

    Attributes:
        version: `ss_base_model_version` of kohya's scripts.
        architecture: `modelspec.architecture`.
        implementation: `modelspec.implementation`.
    """

    version: str
    architecture: str
    implementation: str = "diffusers"


_FLUX = "https://github.com/black-forest-labs/flux"
_BASES = {
    "StableDiffusionXLPipeline": _Base(
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
    ),
    "StableDiffusion3Pipeline": _Base("sd3", "stable-diffusion-3"),
    "FluxPipeline": _Base("flux1", "flux-1-dev", _FLUX),
    _KLEIN: _Base("flux_2_klein_4b", "Flux.2-klein-4b", f"{_FLUX}2"),
    "ZImagePipeline": _Base("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
    "SanaPipeline": _Base("sana", "sana", "https://github.com/NVlabs/Sana"),
}
"""Names of kohya's scripts, but for Sana, which they do not have."""


def save_web_lora(
    weights: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    home: Home,
    path: Path,
    title: str,
    v_prediction: bool = False,
) -> Path:
    """Write a LoRA for web interfaces; return the file.

    U-Nets have kohya's names, such as lora_unet_mid_block_attentions_0_proj_in.lora_down.weight,
    and an alpha per layer. Transformers have diffusers' names, which ComfyUI and Forge take; FLUX.2
    has kohya's, since ComfyUI does not know diffusers' of it. Not all readers take alphas of
    transformers, so these weights are multiplied by alpha / rank.

    Args:
        weights: By peft's names, such as mid_block.attentions.0.proj_in.lora_A.weight.
        rank: Its rank.
        alpha: Its alpha.
        home: The denoiser it belongs to.
        path: Where to.
        title: What the interfaces show.
        v_prediction: Whether a U-Net predicts v.
    """
    if home.name == "unet":
        named = convert_state_dict_to_kohya({f"unet.{n}": value for n, value in weights.items()})
        for name in [name for name in named if name.endswith(".alpha")]:
            named[name] = torch.tensor(float(alpha))
    else:
        scale = alpha / rank
        scaled = {n: value * scale if ".lora_B." in n else value for n, value in weights.items()}
        named = {f"{home.name}.{n}": value for n, value in scaled.items()}
        if home.kind.__name__ == _KLEIN:
            named = original_lora(scaled)
        alpha = rank
    whole = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(whole, path, _metadata(rank, alpha, home, title, v_prediction))
    return path


def check_layers(denoiser: nn.Module, home: Home) -> None:
    """Check that diffusers would find a denoiser's LoRA again in the file of `save_web_lora`.

    Args:
        denoiser: With its LoRA.
        home: The same.

    Raises:
        UsageError: It would not; the layers are named.
    """
    modules = denoiser.named_modules()
    layers = [name for name, layer in modules if isinstance(layer, BaseTunerLayer)]
    if unread := unread_layers(layers, home):
        raise UsageError(
            f"pipeline.init_args.web_lora: diffusers could not read the layers {', '.join(unread)} "
            f"in {WEB_LORA}; leave them out of model.init_args.lora.targets, or set "
            "pipeline.init_args.web_lora to false"
        )


def unread_layers(layers: Iterable[str], home: Home) -> list[str]:
    """Return the layers that diffusers would not find again in the file of `save_web_lora`.

    kohya's names have no dots, and of some layers diffusers does not know where they were.

    Args:
        layers: Names of layers of the denoiser.
        home: The denoiser.
    """
    layers = list(layers)
    if home.name != "unet":
        return without_original(layers) if home.kind.__name__ == _KLEIN else []
    weights = {f"{name}.lora_{half}.weight": torch.zeros(1, 1) for name in layers for half in "AB"}
    named = convert_state_dict_to_kohya({f"unet.{n}": value for n, value in weights.items()})
    read, _ = home.kind.lora_state_dict(named, unet_config=home.config)
    plain = convert_unet_state_dict_to_peft({n.removeprefix("unet."): v for n, v in read.items()})
    return [
        name for name in layers if not plain.keys() >= {f"{name}.lora_{x}.weight" for x in "AB"}
    ]


def _base(home: Home, v_prediction: bool) -> _Base:
    """Return the base model's names."""
    kind, config = home.kind.__name__, home.config
    if kind == "FluxPipeline" and not config.get("guidance_embeds"):
        return _Base("flux1", "flux-1-schnell", _FLUX)
    if kind == _KLEIN and config.get("joint_attention_dim") == _WIDTH_OF_9B:
        return _Base("flux_2_klein_9b", "Flux.2-klein-9b", f"{_FLUX}2")
    if kind in _BASES:
        return _BASES[kind]
    if config.get("cross_attention_dim") != _WIDTH_OF_V2:
        return _Base("sd_v1", "stable-diffusion-v1")
    if v_prediction:
        return _Base("sd_v2_v", "stable-diffusion-v2-768-v")
    return _Base("sd_v2", "stable-diffusion-v2-512")


def _metadata(
    rank: int, alpha: float, home: Home, title: str, v_prediction: bool
) -> dict[str, str]:
    """Return what interfaces read: of kohya's scripts, and of Stability's specification.

    AUTOMATIC1111 shows a LoRA for the loaded model's kind alone, which `ss_base_model_version`
    ("sdxl_...") and `ss_v2` tell it.

    References:
        https://github.com/kohya-ss/sd-scripts, library/sai_model_spec.py, library/model_util.py
        https://github.com/kohya-ss/musubi-tuner, utils/sai_model_spec.py (FLUX.2, Z-Image)
        https://github.com/Stability-AI/ModelSpec
    """
    base = _base(home, v_prediction)
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": base.version,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation,
        "modelspec.title": title,
    }
    if home.name == "unet":
        found["ss_v2"] = str(base.version.startswith("sd_v2"))
        found["modelspec.prediction_type"] = "v" if v_prediction else "epsilon"
    return found
