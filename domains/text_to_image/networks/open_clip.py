"""CLIPs in open_clip's format as transformers' CLIPModel, and the preprocessing with black bars."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from domains.text_to_image.networks.state_dicts import check_has, load_all

__all__ = ["VIT_H_14", "BlackBars", "clip_of_open_clip", "open_clip_names"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH, _VISION_HEAD_WIDTH = 64, 80
"""Widths of the heads of ViT-H/14's towers, which weights do not tell."""

VIT_H_14: Mapping[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
"""Sizes of ViT-H/14, as transformers' CLIPConfig takes them."""


@dataclass(frozen=True)
class BlackBars:
    """HPSv2's preprocessing: the longest side to `size`, black bars to a square, then normalise.

    Attributes:
        size: Height and width in pixels.
        antialias: Resize with an antialiasing filter.
    """

    size: int
    antialias: bool = True

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the vision tower's input for pictures [B, 3, H, W] in [0, 1]."""
        longest = max(pictures.shape[-2:])
        if longest != self.size:
            height, width = (round(n * self.size / longest) for n in pictures.shape[-2:])
            pictures = F.interpolate(
                pictures, (max(height, 1), max(width, 1)), mode="bicubic", antialias=self.antialias
            )
        down, right = (self.size - n for n in pictures.shape[-2:])
        pictures = F.pad(pictures, (right // 2, right - right // 2, down // 2, down - down // 2))
        mean, std = (pictures.new_tensor(v)[:, None, None] for v in (_MEAN, _STD))
        return (pictures - mean) / std


def clip_of_open_clip(state: Mapping[str, Tensor], eos_token_id: int) -> Any:
    """Return a CLIPModel with the weights of an open_clip state dict.

    The numbers of heads are ViT-H/14's: heads 80 wide for pictures, 64 for texts.

    Args:
        state: open_clip's, of a ViT whose activation is the exact GELU.
        eos_token_id: The tokenizer's mark of a text's end, where texts are read off.

    Raises:
        ValueError: Keys are missing, or others are there.
    """
    config = _config(state, eos_token_id)
    with torch.device("meta"):
        model: Any = CLIPModel(config)
    names = open_clip_names(config)
    check_has(state, dict.fromkeys(name for name, _ in names.values()))
    taken = {name for name, _ in names.values()}
    weights = {own: _part(state[name], part) for own, (name, part) in names.items()}
    weights |= {name: state[name] for name in state if name not in taken}
    load_all(model, weights, {own: name for own, (name, _) in names.items()})
    # These hold no weights, but numbers 0, 1, 2, ..., and were made without values.
    for tower in (model.text_model, model.vision_model):
        count = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.register_buffer("position_ids", torch.arange(count)[None], False)
    return model


def open_clip_names(config: CLIPConfig) -> dict[str, tuple[str, str]]:
    """Return open_clip's name, and which part of that weight, by transformers' names.

    Parts are "" for all of it, "q", "k" and "v" for thirds of its rows, "T" for its transpose.
    """
    return dict(_names(config))


def _names(config: CLIPConfig) -> Iterator[tuple[str, tuple[str, str]]]:
    yield "logit_scale", ("logit_scale", "")
    yield "visual_projection.weight", ("visual.proj", "T")
    yield "text_projection.weight", ("text_projection", "T")
    own = "vision_model.embeddings."
    yield f"{own}class_embedding", ("visual.class_embedding", "")
    yield f"{own}patch_embedding.weight", ("visual.conv1.weight", "")
    yield f"{own}position_embedding.weight", ("visual.positional_embedding", "")
    own = "text_model.embeddings."
    yield f"{own}token_embedding.weight", ("token_embedding.weight", "")
    yield f"{own}position_embedding.weight", ("positional_embedding", "")
    for kind in ("weight", "bias"):
        yield f"vision_model.pre_layrnorm.{kind}", (f"visual.ln_pre.{kind}", "")
        yield f"vision_model.post_layernorm.{kind}", (f"visual.ln_post.{kind}", "")
        yield f"text_model.final_layer_norm.{kind}", (f"ln_final.{kind}", "")
        for tower, theirs, sizes in (
            ("vision_model", "visual.", config.vision_config),
            ("text_model", "", config.text_config),
        ):
            for i in range(sizes.num_hidden_layers):
                own = f"{tower}.encoder.layers.{i}"
                block = f"{theirs}transformer.resblocks.{i}"
                yield f"{own}.layer_norm1.{kind}", (f"{block}.ln_1.{kind}", "")
                yield f"{own}.layer_norm2.{kind}", (f"{block}.ln_2.{kind}", "")
                yield f"{own}.mlp.fc1.{kind}", (f"{block}.mlp.c_fc.{kind}", "")
                yield f"{own}.mlp.fc2.{kind}", (f"{block}.mlp.c_proj.{kind}", "")
                yield f"{own}.self_attn.out_proj.{kind}", (f"{block}.attn.out_proj.{kind}", "")
                for part in "qkv":
                    packed = f"{block}.attn.in_proj_{kind}"
                    yield f"{own}.self_attn.{part}_proj.{kind}", (packed, part)


def _part(weight: Tensor, part: str) -> Tensor:
    if part == "T":
        return weight.T
    return weight.chunk(3)["qkv".index(part)] if part else weight


def _config(state: Mapping[str, Tensor], eos_token_id: int) -> CLIPConfig:
    """Return the sizes that a state dict's weights have."""
    needed = (
        *("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "logit_scale"),
        *("token_embedding.weight", "positional_embedding", "text_projection"),
        *(f"{tower}transformer.resblocks.0.mlp.c_fc.weight" for tower in ("visual.", "")),
    )
    check_has(state, needed)
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    patch = conv.shape[-1]
    vocabulary, width = state["token_embedding.weight"].shape
    shared = {"projection_dim": state["text_projection"].shape[1], "hidden_act": "gelu"}
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _blocks(state, "transformer.resblocks."),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "eos_token_id": eos_token_id,
    }
    vision = {
        "hidden_size": conv.shape[0],
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _blocks(state, "visual.transformer.resblocks."),
        "num_attention_heads": max(conv.shape[0] // _VISION_HEAD_WIDTH, 1),
        "image_size": patch * round((positions.shape[0] - 1) ** 0.5),
        "patch_size": patch,
    }
    return CLIPConfig(
        text_config=text | shared,
        vision_config=vision | shared,
        projection_dim=shared["projection_dim"],
    )


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of blocks whose names begin so."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )
