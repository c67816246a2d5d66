"""Whole models in one safetensors file, in the layout of the original code."""

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from domains.text_to_image.extras import load_vae
from domains.text_to_image.families import FAMILIES
from domains.text_to_image.families.checks import left_out
from domains.text_to_image.networks.weightless import bare_pipeline
from lit_rlft.core.checks import UsageError, loading
from lit_rlft.kit.weight_file import refuse_pickle, refuse_quantised, shapes_in
from lit_rlft.kit.weightless import weightless
from lit_rlft.kit.whole_folder import refuse_code

__all__ = ["load_single_file"]

_KEY = "pipeline.init_args.pretrained"
_CONFIG = "pipeline.init_args.config"
_SD, _SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_SD3, _FLUX = "StableDiffusion3Pipeline", "FluxPipeline"
_DENOISER = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
_INSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    _SD: {"text_encoder": ("cond_stage_model.",), "vae": _VAE},
    _SDXL: {
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
        "vae": _VAE,
    },
    _SD3: {
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
        "vae": _VAE,
    },
    _FLUX: {},  # files of FLUX are of the transformer, which the other parts come beside
}
"""How the names of a part's weights begin in the file, beside the denoiser's."""

_ALONE = (
    (
        ("lora_", ".lora.", ".lora_", ".hada_", ".lokr_"),
        "is a LoRA; set model.init_args.lora.pretrained to it, and this key to the model that it "
        "was trained on",
    ),
    (
        ("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax", ".quant_map"),
        "holds quantised weights, which cannot be trained on; give the model in bfloat16 or "
        "float16",
    ),
    (
        ("edm_mean", "edm_vpred."),
        "was trained in EDM's way, as Playground 2.5 and CosXL, which is not supported; give a "
        "model whose scheduler has betas",
    ),
)
_MARKS = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Keys without values by which files of NoobAI's kind say how to sample them: what a scheduler has
to have then."""
_PARTS = (
    (("control_model.", "controlnet_"), "is a ControlNet", "give the model that it controls"),
    (
        ("encoder.down", "decoder.up", "decoder.mid", *_VAE),
        "is a VAE alone",
        "set pipeline.init_args.vae to it, and this key to the whole model",
    ),
    (
        ("emb_params", "clip_l", "clip_g", "string_to_param"),
        "is a textual inversion",
        "set pipeline.init_args.textual_inversions to it, and this key to the whole model",
    ),
    (
        ("text_model.", "transformer.resblocks.", "encoder.block.", "shared.", "text_encoders."),
        "is a text encoder alone",
        "give the whole model",
    ),
    (
        ("cond_stage_model.", "conditioner."),
        "is a text encoder alone",
        "give the whole model",
    ),
    (
        ("down_blocks.", "mid_block.", "transformer_blocks.", "single_transformer_blocks."),
        "is the denoiser of a diffusers folder alone",
        "give the whole folder, with its model_index.json",
    ),
)
"""What a file is that holds no denoiser in the original layout, by how names in it begin."""


def load_single_file(
    path: Path, dtype: torch.dtype, config: str | None = None, vae: str | None = None
) -> DiffusionPipeline:
    """Return the pipeline of a whole checkpoint.

    Args:
        path: A safetensors file: Stable Diffusion 1.x, 2.x, XL or 3.x in the original layout, or
            FLUX.1's transformer.
        dtype: Precision of all weights.
        config: Folder or hub id with the configs, tokenizers and scheduler of such a model, and
            the weights of parts that the file lacks; None takes the hub's for this kind of file.
        vae: Folder, hub id or file of a VAE to take instead of the model's own.

    Raises:
        UsageError: The file is something else or damaged, or a part is nowhere to be found.
    """
    refuse_pickle(path, _KEY)
    shapes = shapes_in(path, _KEY)
    kind = _kind(path, shapes)
    refuse_quantised(path, _KEY)
    source, index = _configs(path, shapes, kind, config)
    _check_scheduler(path, shapes, source, index)
    parts: dict[str, Any] = {} if vae is None else {"vae": load_vae(vae, source, dtype)}
    if weightless():
        bare = bare_pipeline(source, kind, dtype, _CONFIG)
        bare.register_modules(**parts)
        return bare
    lacking = [name for name in FAMILIES[kind].weighed() if _lacks(shapes, kind, name)]
    if kind == _SDXL and len({"text_encoder", "text_encoder_2"} & set(lacking)) == 1:
        raise UsageError(  # diffusers tells the two apart by what both are like
            f"{_KEY}: {path} has one of its two text encoders alone; give the whole model"
        )
    for name in lacking:
        if name not in parts and index.get(name, [None])[0]:
            spare = name not in FAMILIES[kind].needed()
            parts[name] = _from_config(path, source, name, index[name], dtype, spare=spare)
    made: Any = getattr(diffusers, kind)
    beside = ("safety_checker", "feature_extractor", "image_encoder")
    parts = left_out(index, made) | {name: None for name in beside if name in index} | parts
    watermark = {"add_watermarker": False} if kind == _SDXL else {}
    loaded = made.from_single_file(
        str(path), config=source, torch_dtype=dtype, **watermark, **parts
    )
    assert isinstance(loaded, DiffusionPipeline)
    _check_filled(path, loaded)
    loaded.register_to_config(_name_or_path=str(path))
    return loaded


def _kind(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the pipeline's class in diffusers of a file, by the names of its weights."""
    for pieces, problem in _ALONE:
        if any(piece in name for name in shapes for piece in pieces):
            raise UsageError(f"{_KEY}: {path} {problem}")
    names = {name.removeprefix(_DENOISER) for name in shapes}
    if _begin(names, "joint_blocks."):
        return _SD3
    if _begin(names, "double_blocks.") and _begin(names, "single_blocks."):
        if _begin(names, "distilled_guidance_layer.", "double_stream_modulation"):
            raise _unknown(path, shapes)
        _check_channels(path, shapes, "img_in.weight", 64)
        return _FLUX
    if _begin(shapes, f"{_DENOISER}input_blocks."):
        if _begin(shapes, "conditioner.embedders.0.model."):
            raise UsageError(
                f"{_KEY}: {path} is the refiner of Stable Diffusion XL, which is not supported; "
                "give the base model"
            )
        _check_channels(path, shapes, "input_blocks.0.0.weight", 4)
        return _SDXL if _begin(shapes, f"{_DENOISER}label_emb.") else _SD
    for starts, what, remedy in _PARTS:
        if _begin(shapes, *starts):
            raise UsageError(f"{_KEY}: {path} {what}; {remedy}")
    raise _unknown(path, shapes)


def _check_channels(path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, own: int) -> None:
    """Raise UsageError where a denoiser reads a picture or a mask beside the noise."""
    shape = shapes.get(f"{_DENOISER}{name}") or shapes.get(name) or (0, own)
    if shape[1] != own:
        raise UsageError(
            f"{_KEY}: the denoiser of {path} reads {shape[1]} channels, not {own}, as for "
            "inpainting, depth or editing; give a model that draws from prompts alone"
        )


def _unknown(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> UsageError:
    first = next(iter(shapes), None)
    found = "no weights" if first is None else f"weights such as {first}"
    known = ", ".join(FAMILIES[kind].name for kind in _INSIDE)
    return UsageError(
        f"{_KEY}: {path} holds {found}, of none of the models that are known as single files: "
        f"{known}; give a folder that save_pretrained wrote"
    )


def _configs(
    path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str, config: str | None
) -> tuple[str, dict[str, Any]]:
    """Return where the configs are, a folder or hub id, and what its model_index.json says."""
    source = config
    if source is None:
        bare = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        source = str(fetch_diffusers_config(bare)["pretrained_model_name_or_path"])
        rank_zero_info(f"{path.name}: configs, tokenizers and scheduler are those of {source}")
    if Path(source).is_file():
        raise UsageError(f"{_CONFIG}: {source} is a file; give a diffusers folder or a hub id")
    try:
        index = dict(DiffusionPipeline.load_config(source, local_files_only=weightless()))
    except Exception as error:
        raise UsageError(
            f"{_CONFIG}: {path.name} has no configs and tokenizers in it, and those of {source!r} "
            "cannot be read here; set it to a diffusers folder or hub id of the same kind of model "
            "(model_index.json, config.json files and tokenizers; weights only where the file "
            f"lacks a part) ({str(error).strip().partition(chr(10))[0]})"
        ) from error
    refuse_code(index, source, _CONFIG)
    if index.get("_class_name") != kind:
        raise UsageError(
            f"{_CONFIG}: {source!r} is a {index.get('_class_name')}, but {path} is a "
            f"{FAMILIES[kind].name}; give the folder or hub id of one"
        )
    return source, index


def _check_scheduler(
    path: Path, shapes: Mapping[str, tuple[int, ...]], source: str, index: Mapping[str, Any]
) -> None:
    """Raise UsageError where a file says that it is sampled otherwise than the configs have it.

    The configs are not changed here: a tuned model's users load them beside the file, too.
    """
    needed = {mark: wanted for mark, wanted in _MARKS.items() if mark in shapes}
    if not needed:
        return
    name = str(index["scheduler"][1])
    with loading(f"{_CONFIG}: the scheduler of {source!r} could not be read"):
        kind: Any = getattr(diffusers, name)
        options = {"subfolder": "scheduler", "local_files_only": weightless()}
        own = kind.load_config(source, **options)
        read = inspect.signature(kind).parameters
    if all(option in read and own.get(option) == value for option, value in needed.values()):
        return
    told = " and ".join(f'"{option}": {json.dumps(value)}' for option, value in needed.values())
    raise UsageError(
        f"{_CONFIG}: {path} has the key {' and the key '.join(needed)}, which asks for {told}, but "
        f"the {name} of {source!r} is set otherwise; copy those configs, set it in "
        "scheduler/scheduler_config.json (of a class that reads it, such as "
        "EulerDiscreteScheduler) and give the copy"
    )


def _lacks(shapes: Iterable[str], kind: str, part: str) -> bool:
    """Return whether a part's weights are not in the file."""
    if part == FAMILIES[kind].denoiser_name:
        return False
    starts = _INSIDE[kind].get(part)
    return starts is None or not _begin(shapes, *starts)


def _from_config(
    path: Path,
    source: str,
    name: str,
    made: tuple[str, str],
    dtype: torch.dtype,
    *,
    spare: bool,
) -> nn.Module:
    """Load a part that the file lacks from where the configs are; a spare one can be left out."""
    kind: Any = getattr(importlib.import_module(made[0]), made[1])
    sentence = (
        f"{_CONFIG}: {path.name} has no {name} in it, and it could not be loaded from {source!r}; "
        f"give a folder or hub id that has its weights, as safetensors, in {name}/"
    )
    if spare:
        sentence += (
            f", or a folder whose model_index.json has {name} and its tokenizer as [null, null], "
            "to do without it"
        )
    with loading(sentence):
        network = kind.from_pretrained(
            source, subfolder=name, torch_dtype=dtype, use_safetensors=True
        )
    assert isinstance(network, nn.Module)
    return network


def _check_filled(path: Path, loaded: DiffusionPipeline) -> None:
    """Raise UsageError where the file had no values for some weights."""
    for part, network in loaded.components.items():
        if not isinstance(network, nn.Module):
            continue
        empty = [name for name, value in network.named_parameters() if value.is_meta]
        if empty:
            raise UsageError(
                f"{_KEY}: {path} lacks {len(empty)} weights of its {part}, such as {empty[0]}; it "
                "is not a whole model, or of another size than pipeline.init_args.config"
            )


def _begin(names: Iterable[str], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)
