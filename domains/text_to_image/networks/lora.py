"""LoRAs of a U-Net in files: written for diffusers, read as diffusers, peft or kohya write them."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_rlft.core.checks import UsageError, loading

__all__ = ["FUSE", "read_lora", "save_lora"]

FUSE = (
    "fuse it with diffusers (pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights, "
    "pipe.save_pretrained) and start from that folder"
)
"""What to do with a LoRA that cannot be trained on."""

_KEY = "model.init_args.lora.pretrained"
_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PEFT = "base_model.model."
_TEXT = ("text_encoder", "lora_te")
_TRANSFORMER = ("transformer.", "lora_transformer_", "diffusion_model.", "base_model.model.transf")
# By what a name contains or a config sets.
_OTHER_NAMES = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    "lora_mid": "Tucker cores (lora_mid)",
    "lora_B.bias": "biases (lora_bias)",
}
_OTHER_SETTINGS = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "alpha_pattern", "rank_pattern"),
    *("lora_bias", "modules_to_save", "layer_replication", "target_parameters"),
)
# Starts that leave the pretrained weights as they are; the others come with changed ones.
_STARTS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class _File:
    path: Path
    weights: dict[str, Tensor]
    metadata: dict[str, str]


def save_lora(denoiser: UNet2DConditionModel, folder: Path) -> list[Path]:
    """Write a U-Net's LoRA for `StableDiffusionPipeline.load_lora_weights`; return the files.

    All layers have peft's names (lora_A, lora_B): diffusers tells a file's format by its first
    name, and drops the layers that are named otherwise. Names, rank and alpha are all that the
    metadata say, so that other versions of peft can read them.
    """
    weights = get_peft_model_state_dict(denoiser)
    config = denoiser.peft_config["default"]
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=weights,
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted({name.rpartition(".lora_")[0] for name in weights}),
        },
    )
    return sorted(folder.glob("*.safetensors"))


def read_lora(path: Path, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], float | None]:
    """Read a LoRA of a U-Net.

    Args:
        path: A file of diffusers, peft (with adapter_config.json beside it) or kohya, or a folder
            with one.
        unet: The U-Net's config, by which names of kohya's are converted.

    Returns:
        The weights by peft's names, and alpha; None where the file does not tell.

    Raises:
        UsageError: It cannot be read, or is more than a LoRA with one alpha of a U-Net alone.
    """
    file = _opened(_found(path))
    _check(file)
    names = file.weights
    if all(name.startswith("lora_unet_") for name in names):
        return _of_kohya(file, unet)
    if all(name.startswith(_PEFT) for name in names):
        return _of_peft(file)
    return _of_diffusers(file)


def _found(path: Path) -> Path:
    """Return the file to read; pickles are not, since they can run code."""
    if path.is_dir():
        return _within(path)
    if not path.is_file():
        raise UsageError(f"{_KEY}: there is no file {path}")
    if path.suffix in _PICKLES:
        new = path.with_suffix(".safetensors").name
        raise UsageError(
            f"{_KEY}: {path} is a pickle, which can run code; convert it: "
            'python -c "import torch,safetensors.torch as s;s.save_file('
            f"torch.load('{path}',weights_only=True),'{new}')\""
        )
    return path


def _within(folder: Path) -> Path:
    for name in (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(
            f"{_KEY}: {folder} has several files, {_few(file.name for file in files)}; give one"
        )
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    if len(pickles) == 1:
        return _found(pickles[0])
    raise UsageError(f"{_KEY}: there is no file {folder / LORA_WEIGHT_NAME_SAFE}")


def _opened(path: Path) -> _File:
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _File(path, weights, file.metadata() or {})
    except SafetensorError as error:
        raise UsageError(f"{_KEY}: {path} is no safetensors file ({error})") from error


def _check(file: _File) -> None:
    """Raise UsageError where a file holds something else than a LoRA of a U-Net."""
    path, names = file.path, list(file.weights)
    for piece, kind in _OTHER_NAMES.items():
        if any(piece in name for name in names):
            raise UsageError(f"{_KEY}: {path} has {kind}, which is not supported; {FUSE}")
    if any(name.startswith(_TRANSFORMER) and "lora" in name for name in names):
        raise UsageError(
            f"{_KEY}: {path} is a LoRA of a transformer, as SD 3 and FLUX have; give one of the "
            "U-Net that is tuned"
        )
    texts = [name for name in names if name.startswith(_TEXT)]
    if texts and len(texts) < len(names) and all("lora" in name for name in names):
        raise UsageError(
            f"{_KEY} tunes the text encoder too, frozen here; drop it: {_dropping(file)}"
        )
    if any(name.startswith("unet.") and name.endswith(".alpha") for name in names):
        raise UsageError(
            f"{_KEY}: {path} has alphas of single layers, which is not supported beside diffusers' "
            "names; keep one alpha in the metadata, or take the file that kohya's scripts wrote"
        )
    if not names or texts or any("lora" not in name for name in names):
        raise UsageError(
            f"{_KEY}: {path} is no LoRA in diffusers' format, nor peft's or kohya's, of a U-Net"
        )


def _dropping(file: _File) -> str:
    """Return a command that writes the U-Net's part of a file, with its alpha, to a new one."""
    start = 'python -c "from safetensors.torch import *;'
    if LORA_ADAPTER_METADATA_KEY not in file.metadata:
        kept = f"{{k:v for k,v in load_file('{file.path}').items() if 'unet' in k}}"
        return f"{start} save_file({kept},'unet.safetensors')\""
    kept = "{k:f.get_tensor(k) for k in f.keys() if 'unet' in k}"
    opened = f"f=safe_open('{file.path}','pt')"
    return f"{start} {opened}; save_file({kept},'unet.safetensors',f.metadata())\""


def _of_kohya(file: _File, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], float | None]:
    with loading(f"{_KEY}: diffusers cannot convert {file.path}, which kohya's scripts wrote"):
        weights, found = StableDiffusionPipeline.lora_state_dict(
            dict(file.weights), unet_config=unet
        )
    plain = _plain(weights)
    alphas = list((found or {}).values())
    if alphas and len(alphas) != len({name.rpartition(".lora_")[0] for name in plain}):
        raise UsageError(f"{_KEY}: {file.path} has an alpha for some layers alone; {FUSE}")
    if len(set(alphas)) > 1:
        listed = _few(f"{alpha:g}" for alpha in sorted(set(alphas)))
        raise UsageError(f"{_KEY}: {file.path} has several alphas, {listed}; {FUSE}")
    return plain, alphas[0] if alphas else None


def _of_peft(file: _File) -> tuple[dict[str, Tensor], float | None]:
    path = file.path.parent / _CONFIG
    if not path.is_file():
        raise UsageError(
            f"{_KEY}: {file.path} is of peft, whose alpha is in {_CONFIG}; put that file beside it"
        )
    with loading(f"{_KEY}: {path} could not be read"):
        config = dict(json.loads(path.read_text()))
    alpha = _checked_alpha(file, config)
    plain = {name.removeprefix(_PEFT): value for name, value in file.weights.items()}
    return plain, alpha


def _of_diffusers(file: _File) -> tuple[dict[str, Tensor], float | None]:
    with loading(f"{_KEY}: the metadata of {file.path} could not be read"):
        saved = dict(json.loads(file.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    config = {n.removeprefix("unet."): value for n, value in saved.items() if n.startswith("unet.")}
    return _plain(file.weights), _checked_alpha(file, config)


def _checked_alpha(file: _File, config: Mapping[str, Any]) -> float | None:
    """Return alpha from peft's config, which may ask for no more than W + (alpha / rank) B A."""
    odd = [name for name in _OTHER_SETTINGS if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _STARTS:
        odd.append(f"init_lora_weights {start}")
    if config.get("bias", "none") != "none":
        odd.append(f"bias {config['bias']}")
    if config.get("peft_type", "LORA") != "LORA":
        odd.append(f"{config['peft_type']}")
    if odd:
        raise UsageError(
            f"{_KEY}: {file.path} was trained with {odd[0]}, which is not supported; {FUSE}"
        )
    alpha = config.get("lora_alpha")
    if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise UsageError(f"{_KEY}: {file.path} has alpha {alpha!r}, which is no number")
    return alpha


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of diffusers' names by peft's."""
    names = {name.removeprefix("unet."): value for name, value in weights.items()}
    return convert_unet_state_dict_to_peft(names)


def _few(words: Iterable[str], most: int = 5) -> str:
    listed = list(words)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
