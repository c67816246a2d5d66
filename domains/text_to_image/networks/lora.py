"""LoRAs of a denoiser in files: written for diffusers, read as diffusers, peft or kohya do."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_unet_state_dict_to_peft
from lightning.pytorch.utilities import rank_zero_info
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from lit_rlft.core.checks import UsageError, loading
from lit_rlft.kit.files import listed
from lit_rlft.kit.weight_file import PICKLES, check_file

__all__ = ["FUSE", "Home", "lora_weights", "read_lora", "save_lora"]

FUSE = (
    "fuse it with diffusers (pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights, "
    "pipe.save_pretrained) and start from that folder"
)
"""What to do with a LoRA that cannot be trained on."""

_KEY = "model.init_args.lora.pretrained"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]*\w(?<!\.safetensors)")
_CONFIG = "adapter_config.json"
_PEFT = "base_model.model."
_KOHYA, _MODEL = "lora_unet_", "diffusion_model."
_FOREIGN = (_KOHYA, "lora_transformer_", _MODEL)
"""How names begin that diffusers converts to its own."""
_DIFFUSERS_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_TEXT = ("text_encoder", "lora_te")
_OTHERS = {
    "unet": (
        *("transformer.", "lora_transformer_", _MODEL, "base_model.model.transf"),
        *(f"{_KOHYA}{blocks}_blocks" for blocks in ("double", "single", "joint")),
    ),
    "transformer": (
        *("unet.", "base_model.model.down_blocks", "base_model.model.up_blocks"),
        *(f"{_KOHYA}{blocks}_block" for blocks in ("down", "up", "mid")),
        *(f"{_KOHYA}{blocks}_block" for blocks in ("input", "output", "middle")),
    ),
}
"""How names begin in files for another denoiser than the one of this name."""
_WORDS = {
    "unet": ("a transformer, as SD 3 and FLUX have", "the U-Net"),
    "transformer": ("a U-Net, as SD 1.x, 2.x and XL have", "the transformer"),
}
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


@dataclass(frozen=True)
class Home:
    """Where a LoRA belongs.

    Attributes:
        kind: The pipeline's class in diffusers.
        name: The denoiser's name there, "unet" or "transformer".
        config: The denoiser's config, by which names of kohya's are converted.
    """

    kind: type[DiffusionPipeline]
    name: str
    config: Mapping[str, Any]


def save_lora(denoiser: Any, home: Home, folder: Path) -> list[Path]:
    """Write a denoiser's LoRA for `load_lora_weights` of its pipeline; return the files.

    All layers have peft's names (lora_A, lora_B): diffusers tells a file's format by its first
    name, and drops the layers that are named otherwise. Names, rank and alpha are all that the
    metadata say, so that other versions of peft can read them.
    """
    weights = lora_weights(denoiser)
    config = denoiser.peft_config["default"]
    metadata = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in weights}),
    }
    given = {f"{home.name}_lora_layers": weights, f"{home.name}_lora_adapter_metadata": metadata}
    home.kind.save_lora_weights(folder, **given)
    return sorted(folder.glob("*.safetensors"))


def lora_weights(denoiser: Any) -> dict[str, Tensor]:
    """Return a denoiser's LoRA by peft's names."""
    return dict(get_peft_model_state_dict(denoiser))


def read_lora(path: Path, home: Home) -> tuple[dict[str, Tensor], float | None]:
    """Read a LoRA of a denoiser.

    Args:
        path: A file of diffusers, peft (with adapter_config.json beside it), kohya or ai-toolkit,
            or a folder with one. What it has of text encoders is left out, and said.
        home: Where it is to belong.

    Returns:
        The weights by peft's names, and alpha; None where the file does not tell.

    Raises:
        UsageError: It cannot be read, or is more than a LoRA with one alpha of that denoiser alone.
    """
    file = _without_text(_opened(_found(path)))
    _check(file, home)
    names = file.weights
    if all(name.startswith(_MODEL) for name in names):
        own = {name.removeprefix(_MODEL): value for name, value in names.items()}
        if all(name.startswith(_DIFFUSERS_BLOCKS) for name in own):
            renamed = {f"{home.name}.{name}": value for name, value in own.items()}
            return _of_diffusers(_File(file.path, renamed, file.metadata), home)
    if all(name.startswith(_FOREIGN) for name in names):
        return _converted(file, home)
    if all(name.startswith(_PEFT) for name in names):
        return _of_peft(file)
    return _of_diffusers(file, home)


def _found(path: Path) -> Path:
    """Return the file to read; pickles are not, since they can run code."""
    if path.is_dir():
        return _within(path)
    if not path.is_file():
        download = ""
        if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
            download = f"; if it is a hub id, `hf download {path} --local-dir <folder>` comes first"
        raise UsageError(f"{_KEY}: there is no file {path}{download}")
    if path.suffix in PICKLES:
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
    files = listed(folder, "*.safetensors")
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(
            f"{_KEY}: {folder} has several files, {_few(file.name for file in files)}; give one"
        )
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if len(pickles) == 1:
        return _found(pickles[0])
    raise UsageError(f"{_KEY}: there is no file {folder / LORA_WEIGHT_NAME_SAFE}")


def _opened(path: Path) -> _File:
    check_file(path, _KEY)
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _File(path, weights, file.metadata() or {})


def _without_text(file: _File) -> _File:
    """Return the denoiser's part of a file; say what of the text encoders is left out."""
    texts = {name for name in file.weights if name.startswith(_TEXT)}
    if not texts or len(texts) == len(file.weights):
        return file
    layers = {name.partition(".lora_")[0] for name in texts if ".lora_" in name}
    rank_zero_info(
        f"{file.path.name}: its LoRA of text encoders ({len(layers)} layers) is left out, since "
        "they are frozen here"
    )
    kept = {name: value for name, value in file.weights.items() if name not in texts}
    return _File(file.path, kept, file.metadata)


def _check(file: _File, home: Home) -> None:
    """Raise UsageError where a file holds something else than a LoRA of the denoiser."""
    path, names = file.path, list(file.weights)
    for piece, kind in _OTHER_NAMES.items():
        if any(piece in name for name in names):
            raise UsageError(f"{_KEY}: {path} has {kind}, which is not supported; {FUSE}")
    other, own = _WORDS[home.name]
    if any(name.startswith(_OTHERS[home.name]) and "lora" in name for name in names):
        raise UsageError(f"{_KEY}: {path} is a LoRA of {other}; give one of {own} that is tuned")
    names = [name for name in names if not _is_alpha(name, home)]
    if any(name.startswith("unet.") and name.endswith(".alpha") for name in names):
        raise UsageError(
            f"{_KEY}: {path} has alphas of single layers, which is not supported beside diffusers' "
            "names; keep one alpha in the metadata, or take the file that kohya's scripts wrote"
        )
    texts = any(name.startswith(_TEXT) for name in names)
    if any(".joint_blocks." in name or "_joint_blocks_" in name for name in names):
        raise UsageError(
            f"{_KEY}: {path} has the names of Stable Diffusion 3's original code (joint_blocks), "
            "which diffusers cannot read either; give one with names such as "
            "transformer.transformer_blocks"
        )
    if not names or texts or any("lora" not in name for name in names):
        raise UsageError(
            f"{_KEY}: {path} is no LoRA in diffusers' format, nor peft's or kohya's, of {own}"
        )


def _is_alpha(name: str, home: Home) -> bool:
    """Return whether a name is of a layer's alpha that is read: a transformer's, or kohya's."""
    own = ("transformer.", _MODEL, "lora_")
    return home.name == "transformer" and name.startswith(own) and name.endswith(".alpha")


def _converted(file: _File, home: Home) -> tuple[dict[str, Tensor], float | None]:
    """Read a file of kohya's, or of the tools that write as it does, by diffusers' converter."""
    options = {"unet_config": home.config} if home.name == "unet" else {"return_alphas": True}
    named = _by_kohya(file.weights) if home.name == "transformer" else dict(file.weights)
    with loading(f"{_KEY}: diffusers cannot convert {file.path}, which another tool wrote"):
        read = home.kind.lora_state_dict(named, **options)
    # Where there is no other way, the converter puts alphas into the weights.
    weights, found = read if isinstance(read, tuple) else (read, {})
    plain = _plain(weights, home)
    return plain, _one_alpha(file, plain, list((found or {}).values()))


def _by_kohya(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a transformer by kohya's names, which diffusers converts.

    Other tools have the same layers, those of the original code, with dots in their names.
    """
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith(_MODEL):
            layer, kind = _halves(name.removeprefix(_MODEL))
            kind = kind.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            name = f"{_KOHYA}{layer.replace('.', '_')}{kind}"
        named[name] = value
    return named


def _halves(name: str) -> tuple[str, str]:
    """Return a layer's name and what it has of a LoRA, such as ".lora_A.weight" or ".alpha"."""
    layer, mark, rest = name.partition(".lora_")
    return (layer, mark + rest) if mark else (name.removesuffix(".alpha"), ".alpha")


def _one_alpha(file: _File, plain: Mapping[str, Tensor], alphas: list[float]) -> float | None:
    """Return the alpha that all layers of a file have; None where it has none."""
    if alphas and len(alphas) != len({name.rpartition(".lora_")[0] for name in plain}):
        raise UsageError(f"{_KEY}: {file.path} has an alpha for some layers alone; {FUSE}")
    if len(set(alphas)) > 1:
        listed = _few(f"{alpha:g}" for alpha in sorted(set(alphas)))
        raise UsageError(f"{_KEY}: {file.path} has several alphas, {listed}; {FUSE}")
    return alphas[0] if alphas else None


def _of_peft(file: _File) -> tuple[dict[str, Tensor], float | None]:
    path = file.path.parent / _CONFIG
    if not path.is_file():
        raise UsageError(
            f"{_KEY}: {file.path} is of peft, whose alpha is in {_CONFIG}; put that file beside it"
        )
    with loading(f"{_KEY}: {path} could not be read"):
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    alpha = _checked_alpha(file, config)
    plain = {name.removeprefix(_PEFT): value for name, value in file.weights.items()}
    return plain, alpha


def _of_diffusers(file: _File, home: Home) -> tuple[dict[str, Tensor], float | None]:
    with loading(f"{_KEY}: the metadata of {file.path} could not be read"):
        saved = dict(json.loads(file.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    prefix = f"{home.name}."
    config = {n.removeprefix(prefix): value for n, value in saved.items() if n.startswith(prefix)}
    alphas = [float(value) for name, value in file.weights.items() if _is_alpha(name, home)]
    plain = _plain({n: v for n, v in file.weights.items() if not _is_alpha(n, home)}, home)
    alpha = _checked_alpha(file, config)
    return plain, _one_alpha(file, plain, alphas) if alpha is None else alpha


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


def _plain(weights: Mapping[str, Tensor], home: Home) -> dict[str, Tensor]:
    """Return the weights of diffusers' names by peft's."""
    names = {name.removeprefix(f"{home.name}."): value for name, value in weights.items()}
    return convert_unet_state_dict_to_peft(names) if home.name == "unet" else names


def _few(words: Iterable[str], most: int = 5) -> str:
    listed = list(words)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
