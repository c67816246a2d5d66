"""LoRAs in diffusers' file format, of a U-Net or a transformer."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_rlft.core.checks import UsageError

__all__ = ["read_lora", "save_lora"]

_KEY = "model.init_args.lora.pretrained"
_UNSUPPORTED = ("alpha_pattern", "use_rslora", "use_dora")


def save_lora(parts: DiffusionPipeline, denoiser_name: str, folder: Path) -> list[Path]:
    """Write the denoiser's adapter as the family's own trainers do; return the files.

    Args:
        parts: The pipeline of diffusers.
        denoiser_name: "unet" or "transformer".
        folder: Created where missing.
    """
    denoiser = getattr(parts, denoiser_name)
    weights: dict[str, Any] = get_peft_model_state_dict(denoiser)
    if denoiser_name == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    given = {
        f"{denoiser_name}_lora_layers": weights,
        f"{denoiser_name}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
    }
    type(parts).save_lora_weights(folder, **given)
    return sorted(folder.glob("*.safetensors"))


def read_lora(path: Path, denoiser_name: str) -> tuple[dict[str, Tensor], float | None]:
    """Return a LoRA's weights by peft's names, and its alpha if the file says it.

    Args:
        path: The file or its folder.
        denoiser_name: "unet" or "transformer".

    Raises:
        UsageError: It cannot be read, or is of another network.
    """
    path = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{_KEY}: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            saved = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
    except SafetensorError as error:
        raise UsageError(f"{_KEY}: {path} is no safetensors file ({error})") from error
    prefix = f"{denoiser_name}."
    if not weights or any(not name.startswith(prefix) for name in weights):
        raise UsageError(
            f"{_KEY}: {path} is no LoRA in diffusers' format, of a {denoiser_name} alone"
        )
    config = json.loads(saved)
    for kind in _UNSUPPORTED:
        if config.get(f"{prefix}{kind}"):
            raise UsageError(f"{_KEY}: {path} was trained with {kind}, which is not supported")
    plain = {name.removeprefix(prefix): value for name, value in weights.items()}
    if denoiser_name == "unet":
        plain = convert_unet_state_dict_to_peft(plain)
    return plain, config.get(f"{prefix}lora_alpha")
