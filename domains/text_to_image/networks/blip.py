"""ImageReward's BLIP as transformers' BlipVisionModel and BlipTextModel."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from domains.text_to_image.networks.state_dicts import check_has, collapsed, load_all

__all__ = ["BLIP", "blip_of_image_reward"]

_HEAD_WIDTH = 64
"""Width of all heads, which weights do not tell."""
_UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    *(f"blip.{part}_proj.{kind}" for part in ("vision", "text") for kind in ("weight", "bias")),
)
"""What a file may hold beside: places 0, 1, 2, ..., and projections of BLIP's pretraining."""
_MLP = (0, 2, 4, 6, 7)
"""Places of the linear layers of ImageReward's MLP; dropout stands between them."""


class BLIP(nn.Module):
    """BLIP's two encoders and a linear score of the first token.

    Args:
        vision: Sizes of the picture encoder, as BlipVisionConfig takes them.
        text: Sizes of the text encoder, as BlipTextConfig takes them.
    """

    head: nn.Linear

    def __init__(
        self, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        # With transformers' own epsilon pictures' features would be off by 7e-4.
        vision_config = BlipVisionConfig(**{**_VISION, **(vision or {})})
        # Cross-attention is built for decoders alone; it is used as an encoder below.
        text_config = BlipTextConfig(
            **{**_TEXT, **(text or {}), "encoder_hidden_size": vision_config.hidden_size}
        )
        self.vision: Any = BlipVisionModel(vision_config)
        self.text: Any = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = nn.Linear(text_config.hidden_size, 1)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the score of each pair, [B].

        Args:
            pixels: Normalised pictures, [B, 3, H, W].
            input_ids: Tokens of the texts, [B, L].
            attention_mask: 1 for tokens and 0 for padding, [B, L].
        """
        patches = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.int64),
            is_decoder=False,
        ).last_hidden_state
        return self.head(states[:, 0].to(self.head.weight.dtype)).squeeze(1)


_VISION: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_TEXT: Mapping[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": True,
}


def blip_of_image_reward(state: Mapping[str, Tensor]) -> BLIP:
    """Return the network with the weights of ImageReward's state dict.

    Raises:
        ValueError: Keys are missing, or others are there.
    """
    vision, text = _sizes(state)
    with torch.device("meta"):
        network = BLIP(vision, text)
    layers = [tuple(f"mlp.layers.{i}.{kind}" for kind in ("weight", "bias")) for i in _MLP]
    check_has(state, [name for layer in layers for name in layer])
    network.head = collapsed([(state[weight], state[bias]) for weight, bias in layers])
    names = dict(_names(network, vision["num_hidden_layers"]))
    used = {*names.values(), *(name for layer in layers for name in layer), *_UNUSED}
    weights = {own: state[name] for own, name in names.items() if name in state}
    weights |= {name: value for name, value in state.items() if name not in used}
    weights |= {f"head.{name}": value for name, value in network.head.state_dict().items()}
    load_all(network, weights, names)
    text_embeddings = network.text.embeddings
    positions = torch.arange(text["max_position_embeddings"])[None]
    text_embeddings.register_buffer("position_ids", positions, False)
    return network


def _names(network: BLIP, layers: int) -> Iterator[tuple[str, str]]:
    """Iterate over the network's names and those of the same weights in ImageReward's file."""
    for name in network.text.state_dict():
        yield f"text.{name}", f"blip.text_encoder.{name}"
    own, theirs = "vision.", "blip.visual_encoder."
    yield f"{own}embeddings.class_embedding", f"{theirs}cls_token"
    yield f"{own}embeddings.position_embedding", f"{theirs}pos_embed"
    for kind in ("weight", "bias"):
        yield f"{own}embeddings.patch_embedding.{kind}", f"{theirs}patch_embed.proj.{kind}"
        yield f"{own}post_layernorm.{kind}", f"{theirs}norm.{kind}"
        for i in range(layers):
            for part, named in (
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("self_attn.qkv", "attn.qkv"),
                ("self_attn.projection", "attn.proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                yield f"{own}encoder.layers.{i}.{part}.{kind}", f"{theirs}blocks.{i}.{named}.{kind}"


def _sizes(state: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of both encoders that a state dict's weights have."""
    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    inner = "encoder.layer.0.intermediate.dense.weight"
    vision_names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    text_names = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    check_has(state, [seen + name for name in vision_names])
    check_has(state, [read + name for name in (*text_names, inner)])
    patches, positions, fc1 = (state[seen + name] for name in vision_names)
    words, places = (state[read + name] for name in text_names)
    width, text_width = patches.shape[0], words.shape[1]
    vision = {
        "hidden_size": width,
        "intermediate_size": fc1.shape[0],
        "num_hidden_layers": _count(state, seen + "blocks."),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "image_size": patches.shape[-1] * round((positions.shape[1] - 1) ** 0.5),
        "patch_size": patches.shape[-1],
    }
    text = {
        "vocab_size": words.shape[0],
        "hidden_size": text_width,
        "intermediate_size": state[read + inner].shape[0],
        "num_hidden_layers": _count(state, read + "encoder.layer."),
        "num_attention_heads": max(text_width // _HEAD_WIDTH, 1),
        "max_position_embeddings": places.shape[0],
    }
    return vision, text


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )
