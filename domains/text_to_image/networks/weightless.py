"""Pipelines of diffusers, and CLIPs, built from their configs alone, on the meta device."""

import importlib
import inspect
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import AutoConfig, CLIPModel, CLIPTokenizer, PreTrainedModel

from domains.text_to_image.networks.automatic import read_auto
from lit_rlft.kit.weightless import check_cached

__all__ = ["NoTokenizer", "bare_clip", "bare_pipeline"]

_ADDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that are not needed to draw pictures from prompts."""
_CACHED = {"local_files_only": True}
_LEAST, _T5_LENGTH = 2, 512


class NoTokenizer:
    """Stands for a tokenizer whose files are not there: it has a size alone.

    Args:
        vocabulary: Number of its tokens.
        length: Most tokens of a text.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.model_max_length = vocabulary, length

    def __len__(self) -> int:
        return self.vocabulary


def bare_pipeline(source: str, kind: str, dtype: torch.dtype, key: str) -> DiffusionPipeline:
    """Return a pipeline without weights.

    Args:
        source: A folder or a hub id.
        kind: Its class in diffusers.
        dtype: Of the weights that it does not have.
        key: The setting that holds the source, for messages.

    Raises:
        UsageError: A config is missing.
    """
    with check_cached(source, key):
        index = DiffusionPipeline.load_config(source, **_CACHED)
        named = {
            name: part
            for name, part in index.items()
            if isinstance(part, list | tuple) and name not in _ADDED
        }
        parts = {name: _part(source, name, *made) for name, made in named.items()}
    for name, part in parts.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and part is None and encoder is not None:
            length = getattr(encoder.config, "max_position_embeddings", _T5_LENGTH)
            parts[name] = NoTokenizer(encoder.config.vocab_size, length)
    made = getattr(diffusers, kind)
    settings = {n: v for n, v in index.items() if n[0] != "_" and n not in (*named, *_ADDED)}
    known = inspect.signature(made.__init__).parameters
    needed = [name for name, one in known.items() if one.default is one.empty and name != "self"]
    left_out = dict.fromkeys([*needed, *(name for name in _ADDED if name in known)])
    kept = {name: value for name, value in settings.items() if name in known}
    loaded = made(**(left_out | parts), **kept)
    assert isinstance(loaded, DiffusionPipeline)
    loaded.register_to_config(_name_or_path=source)
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own warns of modules that it would not cast
    return loaded


def _part(source: str, name: str, library: str | None, kind: str | None) -> Any:
    """Return one part: a network without weights, a scheduler, a tokenizer."""
    if library is None or kind is None:
        return None
    made: Any = getattr(importlib.import_module(library), kind)
    where: dict[str, Any] = {"subfolder": name, **_CACHED}
    if issubclass(made, PreTrainedModel):
        config = made.config_class.from_pretrained(source, **where)
        with torch.device("meta"):
            return made(config)
    if issubclass(made, nn.Module):
        config = made.load_config(source, **where)
        with torch.device("meta"):
            return made.from_config(config)
    if name.startswith("tokenizer"):
        return _tokenizer(made, source, **where)
    return made.from_pretrained(source, **where)


def _tokenizer(made: Any, source: str, **where: Any) -> Any:
    """Return a tokenizer; None where its files are not there."""
    try:
        found = made.from_pretrained(source, **where)
    except (OSError, ValueError, TypeError):
        return None
    return found if len(found) > _LEAST else None  # some classes make an empty one of nothing


def bare_clip(source: str, key: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a CLIP without weights, its tokenizer and its preprocessor's settings."""
    with check_cached(source, key):
        config = read_auto(AutoConfig, source, **_CACHED)
    with torch.device("meta"):
        model = CLIPModel(config)
    size = config.vision_config.image_size
    text = config.text_config
    tokenizer = _tokenizer(CLIPTokenizer, source, **_CACHED) or NoTokenizer(
        text.vocab_size, text.max_position_embeddings
    )
    return model, tokenizer, {"size": size, "crop_size": size}
