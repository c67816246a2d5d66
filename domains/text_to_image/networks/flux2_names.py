"""A LoRA of FLUX.2 by the names of the original code, which web interfaces know it by.

References:
    https://github.com/kohya-ss/musubi-tuner, networks/lora_flux_2.py (the names)
    https://github.com/comfyanonymous/ComfyUI, comfy/lora.py (what is read)
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["original_lora", "without_original"]

_JOINED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
"""Layers of diffusers that are thirds of one layer of the original code."""
_DOUBLE = {
    **dict.fromkeys(_JOINED[0], "img_attn.qkv"),
    **dict.fromkeys(_JOINED[1], "txt_attn.qkv"),
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_OTHERS = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}


def original_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA by the names of kohya's scripts; the scale of each layer is 1.

    Queries, keys and values become one layer of three times the rank, whose second matrix is
    block-diagonal; readers that know this form split it again without loss.

    Args:
        weights: By peft's names, such as transformer_blocks.0.attn.to_q.lora_A.weight, [r, in] and
            [out, r], in diffusers' layout, multiplied by alpha / r.
    """
    layers = dict.fromkeys(name.partition(".lora_")[0] for name in weights)
    pairs = {
        layer: (weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"])
        for layer in layers
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        own = _original(layer)
        if own not in found:
            thirds = [pairs.get(each) for each in _thirds(layer)]
            found[own] = _joined(thirds) if thirds else pairs[layer]
    return {
        f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight": value
        for name, both in found.items()
        for half, value in zip(("down", "up"), both, strict=True)
    }


def without_original(layers: Iterable[str]) -> list[str]:
    """Return the layers that have no name there, or another order of their numbers."""
    return [layer for layer in layers if not _original(layer)]


def _original(layer: str) -> str:
    """Return a layer's name in the original code; "" where it has none."""
    kind, number, name = _parts(layer)
    if kind == "single_transformer_blocks" and name in _SINGLE:
        return f"single_blocks.{number}.{_SINGLE[name]}"
    if kind == "transformer_blocks" and name in _DOUBLE:
        return f"double_blocks.{number}.{_DOUBLE[name]}"
    return _OTHERS.get(layer, "")


def _thirds(layer: str) -> list[str]:
    """Return the layers that are joined with this one, in their order; none for most."""
    kind, number, name = _parts(layer)
    joined = next((each for each in _JOINED if name in each), ())
    return [f"{kind}.{number}.{each}" for each in joined]


def _parts(layer: str) -> tuple[str, str, str]:
    """Return the kind of block, its number and the name within it."""
    kind, number, name = (*layer.split(".", 2), "", "")[:3]
    return kind, number, name


def _joined(thirds: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return what joins three layers; one that has no LoRA has zeros."""
    down, up = next(each for each in thirds if each is not None)
    nothing = torch.zeros_like(down), torch.zeros_like(up)
    downs, ups = zip(*(each or nothing for each in thirds), strict=True)
    return torch.cat(downs), torch.block_diag(*ups)  # type: ignore[no-untyped-call]
