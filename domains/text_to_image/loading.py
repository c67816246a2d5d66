"""Loads a text-to-image model of a known family: from a folder, by an embedded name, a hub id."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from domains.text_to_image import EMBEDDED
from domains.text_to_image.extras import add_textual_inversions, load_vae
from domains.text_to_image.families import FAMILIES
from domains.text_to_image.families.checks import left_out
from domains.text_to_image.networks.on_demand import hollow, read_network
from domains.text_to_image.networks.weightless import bare_pipeline
from domains.text_to_image.single_file import load_single_file
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import found_variant, load_pretrained, source_of
from lit_rlft.kit.weight_file import PICKLES
from lit_rlft.kit.weightless import check_cached, weightless
from lit_rlft.kit.whole_folder import check_whole, refuse_code

__all__ = ["Files", "load_parts", "text_encoder_reader"]

_KEY = "pipeline.init_args.pretrained"
_ALIKE = {"StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline"}
"""Pipelines of the same parts, used in the same way to generate pictures from prompts alone."""
_NEW_PARTS = ("unet", "text_encoder")
"""Parts that `from_scratch` draws anew."""
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""What diffusers would add to a picture, or refuse one for; rewards are to see the model's own."""

_NO_SAFETENSORS = ("necessary `safetensors`", "no file named")
"""What diffusers and transformers say where there are pickles alone."""


@dataclass(frozen=True)
class Files:
    """What comes beside a model.

    Attributes:
        config: Of a single file: folder or hub id with what the file has not.
        vae: Folder, hub id or file of a VAE to take instead of the model's own.
        textual_inversions: Files with further tokens for prompts.
        hollow_encoders: Leave the text encoders without weights; `text_encoder_reader` reads them.
    """

    config: str | None = None
    vae: str | None = None
    textual_inversions: Sequence[str] = ()
    hollow_encoders: bool = False


def load_parts(
    pretrained: str,
    dtype: torch.dtype = torch.float32,
    files: Files = Files(),
    *,
    variant: str | None = None,
    from_scratch: bool = False,
) -> DiffusionPipeline:
    """Return the pipeline of diffusers that `pretrained` names.

    Args:
        pretrained: A folder, an embedded model's name, a hub id or a single safetensors file.
        dtype: Precision of all weights; a VAE that overflows in half precision stays in single.
        files: What comes beside it.
        variant: Which files of weights, such as "fp16"; None takes plain ones, and where a folder
            has none the one variant that is there.
        from_scratch: Draw new weights for U-Net and text encoder.

    Raises:
        UsageError: It cannot be loaded, or it is of a family that is not known here.
    """
    _check_file_settings(pretrained, variant, from_scratch, files.config)
    parts = load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: _read(source, dtype, variant, from_scratch, files),
        kind="a text-to-image model",
        give="'shapes', a folder that save_pretrained wrote or a hub id",
    )
    if dtype == torch.float16 and parts.vae.config.get("force_upcast"):
        parts.vae.float()
    add_textual_inversions(parts, files.textual_inversions)
    return parts


def text_encoder_reader(
    pretrained: str, dtype: torch.dtype, variant: str | None
) -> Callable[[str], nn.Module]:
    """Return a function that reads a text encoder of a folder or hub id by its name."""
    source = source_of(pretrained, EMBEDDED)

    def read(name: str) -> nn.Module:
        own = variant
        if own is None and Path(source).is_dir():
            own = found_variant(Path(source), (name,))
        return read_network(source, name, dtype, own)

    return read


def _check_file_settings(
    pretrained: str, variant: str | None, from_scratch: bool, config: str | None
) -> None:
    """Raise UsageError for settings that are of folders alone, or of single files alone."""
    if not Path(pretrained).is_file():
        if pretrained.endswith((".safetensors", *PICKLES)) and not Path(pretrained).exists():
            raise UsageError(f"{_KEY}: there is no file {pretrained}")
        if config is not None:
            raise UsageError(
                "pipeline.init_args.config goes with a single file; set it to null, since "
                f"{pretrained!r} has its own configs"
            )
        return
    for name, given in (("variant", variant), ("from_scratch", from_scratch)):
        if given:
            raise UsageError(
                f"pipeline.init_args.{name} is for folders and hub ids; leave it out for the "
                f"single file {pretrained}"
            )


def _read(
    source: str,
    dtype: torch.dtype,
    variant: str | None,
    from_scratch: bool,
    files: Files,
) -> DiffusionPipeline:
    folder, vae = Path(source), files.vae
    if folder.is_file():
        return load_single_file(folder, dtype, files.config, vae)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{_KEY}: {folder} has no model_index.json, so it is no diffusers pipeline; give a "
            "folder written by save_pretrained or a hub id"
        )
    kind, index = _known_kind(source)
    _check_half(kind, dtype)
    new: dict[str, Any] = {} if vae is None else {"vae": load_vae(vae, source, dtype)}
    if weightless():
        bare = bare_pipeline(source, kind, dtype, _KEY)
        bare.register_modules(**new)
        return bare
    if variant is None and folder.is_dir():
        variant = found_variant(folder, FAMILIES[kind].weighed())
    if folder.is_dir():
        others = {*new, *(_NEW_PARTS if from_scratch else ())}
        read = [part for part in FAMILIES[kind].weighed() if part not in others]
        check_whole(folder, read, variant, _KEY)
    new |= _new_networks(source, kind, dtype) if from_scratch else {}
    new |= hollow(source, FAMILIES[kind].encoder_names, dtype) if files.hollow_encoders else {}
    new = left_out(index, getattr(diffusers, kind)) | _LEFT_OUT.get(kind, {}) | new
    loaded = _from_diffusers(source, kind, torch_dtype=dtype, variant=variant, **new)
    for part in loaded.components.values():
        if isinstance(part, nn.Module) and next(part.parameters()).dtype not in (
            dtype,
            torch.float32,
        ):
            part.to(dtype)
    return loaded


def _from_diffusers(source: str, kind: str, **given: Any) -> DiffusionPipeline:
    """Return a pipeline that diffusers loads, without pickles."""
    with warnings.catch_warnings():
        # Older versions know this name of `dtype` alone.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        try:
            loaded = getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, **given)
        except OSError as error:
            if not any(said in str(error) for said in _NO_SAFETENSORS):
                raise
            raise UsageError(
                f"{_KEY}: {source!r} has no safetensors files of a part, and pickles, which can "
                f'run code, are not loaded; convert it: python -c "from diffusers import {kind} '
                f"as p;p.from_pretrained('{source}').save_pretrained('safetensors')\", and give "
                "that folder"
            ) from error
    assert isinstance(loaded, DiffusionPipeline)
    return loaded


def _check_half(kind: str, dtype: torch.dtype) -> None:
    family = FAMILIES[kind]
    if dtype == torch.float16 and family.overflows_in_half:
        raise UsageError(
            f"pipeline.init_args.frozen_dtype is float16, in which the "
            f"{' and the '.join(family.overflows_in_half)} of {family.name} overflow; set it to "
            "bfloat16 or float32"
        )


def _known_kind(source: str) -> tuple[str, dict[str, Any]]:
    """Return a folder's or hub id's class in diffusers, of a known family, and its parts."""
    if weightless():
        with check_cached(source, _KEY):
            index = dict(DiffusionPipeline.load_config(source, local_files_only=True))
    else:
        index = dict(DiffusionPipeline.load_config(source))
    saved = index.get("_class_name", "StableDiffusionPipeline")
    kind = _ALIKE.get(str(saved), str(saved))
    if kind not in FAMILIES:
        raise UsageError(
            f"{_KEY}: {source!r} is a {saved}, which is not supported; known are "
            f"{', '.join(FAMILIES)}"
        )
    refuse_code(index, source, _KEY)
    family = FAMILIES[kind]
    absent = [name for name in family.needed() if index.get(name) in (None, [None, None])]
    if absent:  # diffusers would stop at them, with a sentence about its own arguments
        raise UsageError(
            f"{_KEY}: {source!r} is not supported: it has no {' and no '.join(absent)}; give a "
            f"text-to-image model of the kind of {family.name}"
        )
    return kind, index


def _new_networks(source: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    if kind != "StableDiffusionPipeline":
        raise UsageError(
            "pipeline.init_args.from_scratch is for Stable Diffusion 1.x and 2.x, not for a "
            f"{kind}; set it to false"
        )
    unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    text = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
    new = {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}
    return {name: network.to(dtype) for name, network in new.items()}
