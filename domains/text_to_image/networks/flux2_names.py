"""A LoRA of FLUX.2 by the names of the original code, which web interfaces know it by.

References:
    https://github.com/kohya-ss/musubi-tuner, networks/lora_flux_2.py (the names)
    https://github.com/comfyanonymous/ComfyUI, comfy/lora.py (what is read)
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["original_lora", "without_original"]

_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers of diffusers that are thirds of one layer of the original code."""
_OTHERS = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}


def original_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA by the names of kohya's scripts; the scale of each layer is 1.

    Queries, keys and values become one layer of three times the rank, whose second matrix is
    block-diagonal; readers that know this form split it again without loss.

    Args:
        weights: By peft's names, such as transformer_blocks.0.attn.to_q.lora_A.weight, [r, in] and
            [out, r], in diffusers' layout, multiplied by alpha / r.
    """
    layers = {name.partition(".lora_")[0]: None for name in weights}
    pairs = {
        layer: (weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"])
        for layer in layers
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, (down, up) in pairs.items():
        own, part = _original(layer)
        if part is None:
            found[own] = down, up
        elif own not in found:
            found[own] = _joined([pairs.get(each) for each in _thirds(layer)])
    return {
        f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight": value
        for name, both in found.items()
        for half, value in zip(("down", "up"), both, strict=True)
    }


def without_original(layers: Iterable[str]) -> list[str]:
    """Return the layers that have no name there, or another order of their numbers."""
    return [layer for layer in layers if not _original(layer)[0]]


def _original(layer: str) -> tuple[str, int | None]:
    """Return the name in the original code and, of queries, keys and values, which it is."""
    kind, number, name = (*layer.split(".", 2), "", "")[:3]
    if kind == "single_transformer_blocks" and name in _SINGLE:
        return f"single_blocks.{number}.{_SINGLE[name]}", None
    if kind == "transformer_blocks":
        if name in _DOUBLE:
            return f"double_blocks.{number}.{_DOUBLE[name]}", None
        for whole, thirds in _JOINED.items():
            if name in thirds:
                return f"double_blocks.{number}.{whole}", thirds.index(name)
    return _OTHERS.get(layer, ""), None


def _thirds(layer: str) -> list[str]:
    """Return the layers that are joined with one, in their order."""
    start, number, name = layer.split(".", 2)
    thirds = next(each for each in _JOINED.values() if name in each)
    return [f"{start}.{number}.{each}" for each in thirds]


def _joined(thirds: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return what joins three layers; one that has no LoRA has zeros."""
    down, up = next(each for each in thirds if each is not None)
    both = [each or (torch.zeros_like(down), torch.zeros_like(up)) for each in thirds]
    return torch.cat([a for a, _ in both]), torch.block_diag(*(b for _, b in both))
