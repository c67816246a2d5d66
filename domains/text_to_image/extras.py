"""What people put in place of a model's own parts, or beside them: a VAE, textual inversions."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    DiffusionPipeline,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file

from lit_rlft.core.checks import UsageError, loading
from lit_rlft.kit.weight_file import check_file, refuse_pickle, refuse_quantised
from lit_rlft.kit.weightless import weightless
from lit_rlft.kit.whole_folder import refuse_pickles

__all__ = ["add_textual_inversions", "load_vae"]

_VAE = "pipeline.init_args.vae"
_INVERSIONS = "pipeline.init_args.textual_inversions"
_VAE_KINDS: dict[str, tuple[type[Any], ...]] = {
    "AutoencoderKL": (AutoencoderKL, AutoencoderTiny),
    "AutoencoderTiny": (AutoencoderKL, AutoencoderTiny),
    "AutoencoderDC": (AutoencoderDC,),
    "AutoencoderKLFlux2": (AutoencoderKLFlux2,),
}
"""Classes of VAEs that can take the place of a model's own, by its class; whole ones first."""


def load_vae(
    given: str, model: str, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny | AutoencoderDC | AutoencoderKLFlux2:
    """Return a VAE that takes the place of a model's own.

    Args:
        given: A folder with its config.json, or with one in vae/; a hub id of the same; or a
            safetensors file.
        model: Folder or hub id of the model, whose latents the VAE has to decode.
        dtype: Precision of its weights.

    Raises:
        UsageError: It cannot be loaded, or its latents have other channels or another scale.
    """
    own = AutoencoderKL.load_config(model, subfolder="vae")
    kinds = _VAE_KINDS.get(str(own.get("_class_name")), _VAE_KINDS["AutoencoderKL"])
    whole = kinds[0]
    if Path(given).is_file():
        return _vae_of_file(Path(given), model, dtype, whole)
    with loading(
        f"{_VAE}: {given!r} could not be loaded; give a folder or hub id with the config.json of "
        f"an {whole.__name__} and its safetensors file, or that file"
    ):
        config, where = _config(given)
        named = {kind.__name__: kind for kind in kinds}
        kind = named.get(str(config.get("_class_name")))
        if kind is None:
            raise UsageError(
                f"{_VAE}: {given!r} is of class {config.get('_class_name')}, not an "
                f"{' or '.join(named)}"
            )
        _check_latents(given, config, own, kind)
        if weightless():
            with torch.device("meta"):
                return kind.from_config(config)
        refuse_pickles(Path(given) / where.get("subfolder", ""), kind.__name__, _VAE)
        return kind.from_pretrained(given, torch_dtype=dtype, use_safetensors=True, **where)


def _vae_of_file(path: Path, model: str, dtype: torch.dtype, kind: type[Any]) -> Any:
    """Return the VAE in a file, alone or in a whole checkpoint, by the config of a model's own."""
    if kind.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UsageError(
            f"{_VAE}: diffusers reads no single file of an {kind.__name__}, which the VAE of "
            f"{model!r} is; give a folder with its config.json, or a hub id"
        )
    refuse_pickle(path, _VAE)
    check_file(path, _VAE)
    refuse_quantised(path, _VAE)
    with loading(f"{_VAE}: {path} could not be loaded as the VAE of a model like {model!r}"):
        network = kind.from_single_file(str(path), config=model, subfolder="vae", torch_dtype=dtype)
    empty = [name for name, value in network.named_parameters() if value.is_meta]
    if empty:
        raise UsageError(
            f"{_VAE}: {path} is no VAE of a model like {model!r}: it lacks {len(empty)} weights, "
            f"such as {empty[0]}; give a file or folder of an {kind.__name__}"
        )
    return network


def _config(given: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a VAE's config, and in which sub-folder it is."""
    options: dict[str, Any] = {"local_files_only": True} if weightless() else {}
    folder = Path(given)
    within = folder.is_dir() and not (folder / "config.json").is_file()
    where = {"subfolder": "vae"} if within else {}
    try:
        return dict(AutoencoderKL.load_config(given, **where, **options)), where
    except OSError:
        if folder.is_dir():
            raise
        where = {"subfolder": "vae"}
        return dict(AutoencoderKL.load_config(given, **where, **options)), where


def _check_latents(given: str, config: dict[str, Any], own: dict[str, Any], kind: type) -> None:
    """Raise UsageError where a VAE's latents are not those that the denoiser draws."""
    names = ["latent_channels"]
    if kind is not AutoencoderTiny:  # it is trained on scaled latents
        names += ["scaling_factor", "shift_factor", "latents_mean", "latents_std"]
    config, own = _completed(config), _completed(own)
    for name in names:
        theirs, ours = (each.get(name) or None for each in (config, own))  # a shift of 0 is none
        if theirs != ours:
            raise UsageError(
                f"{_VAE}: {given!r} has {name} {theirs}, and the model's own VAE {ours}; give a "
                "VAE of the same kind of model, since the denoiser draws latents of that kind"
            )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a VAE's config with its class's defaults: files of older releases lack some keys."""
    kinds = (kind for kinds in _VAE_KINDS.values() for kind in kinds)
    named = {kind.__name__: kind for kind in kinds}
    kind = named.get(str(config.get("_class_name")), AutoencoderKL)
    arguments = inspect.signature(kind.__init__).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not each.empty}
    return defaults | config


def add_textual_inversions(parts: DiffusionPipeline, files: Sequence[str]) -> list[str]:
    """Teach a model's tokenizers and text encoders further tokens; return those.

    Args:
        parts: Stable Diffusion 1.x, 2.x or XL.
        files: Files of safetensors. The token is the one that a file names, or else its own name.

    Raises:
        UsageError: The model's family takes none, or a file is none or of other text encoders.
    """
    known: list[str] = []
    for given in files:
        path = Path(given)
        if not hasattr(parts, "load_textual_inversion"):
            raise UsageError(
                f"{_INVERSIONS}: a {type(parts).__name__} takes no textual inversions; leave it out"
            )
        if not path.is_file():
            raise UsageError(f"{_INVERSIONS}: there is no file {path}")
        refuse_pickle(path, _INVERSIONS)
        check_file(path, _INVERSIONS)
        known += [token for token in _learned(parts, path) if token not in known]
    if known:
        rank_zero_info(f"textual inversions, to use in prompts: {', '.join(known)}")
    return known


def _learned(parts: Any, path: Path) -> list[str]:
    """Add one file's tokens; return them."""
    if weightless():
        return [path.stem]
    weights = load_file(path)
    pairs = [("clip_l", "tokenizer", "text_encoder"), ("clip_g", "tokenizer_2", "text_encoder_2")]
    if not weights.keys() & {"clip_l", "clip_g"}:
        if hasattr(parts, "text_encoder_2"):
            raise UsageError(
                f"{_INVERSIONS}: {path} has no clip_l and clip_g, so it is not of Stable Diffusion "
                "XL; give one that was trained on this kind of model"
            )
        found = weights if "emb_params" in weights or len(weights) == 1 else None
        if found is None:
            raise UsageError(
                f"{_INVERSIONS}: {path} is no textual inversion: it holds {len(weights)} tensors, "
                "not emb_params, clip_l and clip_g or one token's vectors"
            )
        pairs = [(next(iter(found)), "tokenizer", "text_encoder")]
    for name, _, encoder in pairs:
        if name not in weights or not hasattr(parts, encoder):
            raise UsageError(
                f"{_INVERSIONS}: {path} holds {' and '.join(sorted(weights))}, which are not what "
                f"a {type(parts).__name__} takes; give one that was trained on this kind of model"
            )
        width = getattr(parts, encoder).get_input_embeddings().weight.shape[1]
        if weights[name].shape[-1] != width:
            raise UsageError(
                f"{_INVERSIONS}: {path} has vectors of {weights[name].shape[-1]} numbers, the "
                f"model's {encoder} of {width}; give one that was trained on this kind of model"
            )
    token = path.stem if pairs[0][0] in ("clip_l", "emb_params") else pairs[0][0]
    for name, tokenizer, encoder in pairs:
        with loading(f"{_INVERSIONS}: {path} could not be added as the token {token!r}"):
            parts.load_textual_inversion(
                {token: weights[name]},
                token=token,
                text_encoder=getattr(parts, encoder),
                tokenizer=getattr(parts, tokenizer),
            )
    return [token]
