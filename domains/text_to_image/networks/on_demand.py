"""Text encoders that are read from disk for an encoding alone, and forgotten after it."""

import importlib
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

__all__ = ["hollow", "read_network"]


def hollow(source: str, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return networks of a model that have no weights yet, by name, those that the model has.

    Args:
        source: A folder or hub id of a diffusers pipeline.
        names: The networks' folders.
        dtype: Of the weights that they do not have.
    """
    found = {}
    for name, kind in _kinds(source, names).items():
        config = kind.config_class.from_pretrained(source, subfolder=name)
        with torch.device("meta"):
            found[name] = nn.Module.to(kind(config), dtype)
    return found


def read_network(source: str, name: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """Return a network of a model with its weights, on the CPU.

    Args:
        source: A folder or hub id of a diffusers pipeline.
        name: The network's folder.
        dtype: Of the weights.
        variant: Which files of weights; None takes plain ones.
    """
    kind = _kinds(source, (name,))[name]
    network: nn.Module = kind.from_pretrained(
        source, subfolder=name, dtype=dtype, variant=variant, use_safetensors=True
    )
    return network


def _kinds(source: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the classes of a model's networks by name."""
    index = DiffusionPipeline.load_config(source)
    named = {name: index.get(name) for name in names}
    kinds = {
        name: getattr(importlib.import_module(one[0]), one[1])
        for name, one in named.items()
        if one and None not in one
    }
    return {name: kind for name, kind in kinds.items() if issubclass(kind, PreTrainedModel)}
