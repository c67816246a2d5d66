"""Tiny models as the single files of the original code: diffusers' conversion, the other way."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.domains.text_to_image.families.tiny import tiny

__all__ = ["as_one_file", "of_two_widths", "sgm_names"]

Weights = dict[str, Tensor]
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_NARROW = 16


def of_two_widths(name: str) -> DiffusionPipeline:
    """Return a tiny model whose second CLIP is narrower, by which single files tell them apart."""
    pipe = tiny(name)
    if name.startswith("sdxl") or name == "sd3":
        config = {**pipe.text_encoder_2.config.to_dict(), "hidden_size": _NARROW}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            second = CLIPTextModelWithProjection(
                CLIPTextConfig(**{**config, "projection_dim": _NARROW})
            )
            changed: dict[str, Any] = {"text_encoder_2": second.eval()}
            width = pipe.text_encoder.config.hidden_size + _NARROW
            if name == "sd3":
                settings = {**pipe.transformer.config, "pooled_projection_dim": width}
                changed["transformer"] = SD3Transformer2DModel.from_config(settings).eval()
                # The files hold no projection of the first CLIP: it is the identity.
                pipe.text_encoder.text_projection.weight.data = torch.eye(width - _NARROW)
            else:
                settings = {
                    **pipe.unet.config,
                    "cross_attention_dim": width,
                    "projection_class_embeddings_input_dim": 6 * 8 + _NARROW,
                }
                changed["unet"] = UNet2DConditionModel.from_config(settings).eval()
        pipe.register_modules(**changed)
    return pipe


def as_one_file(name: str, pipe: Any) -> Weights:
    """Return all weights of a model under the names of the original code."""
    vae = _vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))
    if name.startswith("flux"):
        return _flux(pipe.transformer.state_dict(), pipe.transformer.config)
    first = _plain(pipe.text_encoder.state_dict())
    found = {f"first_stage_model.{key}": value for key, value in vae.items()}
    if name == "sd3":
        found |= _named("model.diffusion_model.", _sd3(pipe.transformer.state_dict()))
        first.pop("text_projection.weight")
        found |= _named("text_encoders.clip_l.transformer.", first)
        found |= _named("text_encoders.clip_g.transformer.", pipe.text_encoder_2.state_dict())
        found |= _named("text_encoders.t5xxl.transformer.", pipe.text_encoder_3.state_dict())
        return _apart(found)
    found |= _named("model.diffusion_model.", _unet(pipe.unet))
    if name == "sd":
        return _apart(found | _named("cond_stage_model.transformer.", first))
    found |= _named("conditioner.embedders.0.transformer.", first)
    second = _open_clip(pipe.text_encoder_2.state_dict())
    return _apart(found | _named("conditioner.embedders.1.model.", second))


def _named(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def _apart(weights: Mapping[str, Tensor]) -> Weights:
    return {name: value.clone().contiguous() for name, value in weights.items()}


def _plain(weights: Mapping[str, Tensor]) -> Weights:
    """Return a CLIP's weights as older transformers name them."""
    kept = {name.removeprefix("text_model."): value for name, value in weights.items()}
    return {n if n.startswith("text_proj") else f"text_model.{n}": v for n, v in kept.items()}


def _unet(unet: Any) -> Weights:
    names = sgm_names(unet)
    return {names[name]: value for name, value in unet.state_dict().items()}


def sgm_names(unet: Any) -> dict[str, str]:
    """Return the names of a U-Net's weights in the original code, by those in diffusers."""
    rows = unet.config.layers_per_block + 1
    found: dict[str, str] = {}
    for name in unet.state_dict():
        layer, _, kind = name.rpartition(".")
        new = _UNET.get(layer, layer)
        for part, index, shift in (("down", "input", 1), ("up", "output", 0)):
            new = re.sub(
                rf"^{part}_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
                lambda m, i=index, s=shift: (  # type: ignore[misc]
                    f"{i}_blocks.{s + int(m[1]) * rows + int(m[3])}.{0 if m[2] == 'resnets' else 1}"
                ),
                new,
            )
        if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", layer):
            new = f"input_blocks.{(int(match[1]) + 1) * rows}.0.op"
        if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", layer):
            block = int(match[1])
            place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            new = f"output_blocks.{(block + 1) * rows - 1}.{place}.conv"
        for old, middle in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
            new = new.replace(f"mid_block.{old}", f"middle_block.{middle}")
        if "resnets" in layer:
            for old, own in _RESNET.items():
                new = new.replace(f".{old}", f".{own}")
        found[name] = f"{new}.{kind}"
    return found


def _vae(weights: Mapping[str, Tensor], levels: int) -> Weights:
    found: Weights = {}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for name, value in weights.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(
            r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new
        )
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0",
            lambda m: f"up.{levels - 1 - int(m[1])}.upsample",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions" in name:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for old, own in attention.items():
                new = new.replace(f".{old}.", f".{own}.")
            if value.ndim == 2:
                value = value[:, :, None, None]
        found[new] = value
    return found


def _open_clip(weights: Mapping[str, Tensor]) -> Weights:
    found: Weights = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        new = name.removeprefix("text_model.")
        if new == "text_projection.weight":
            found["text_projection"] = value.T
            continue
        new = new.replace("encoder.layers.", "transformer.resblocks.")
        new = new.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
        new = new.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        new = new.replace("self_attn", "attn").replace("final_layer_norm", "ln_final")
        new = new.replace("embeddings.token_embedding", "token_embedding")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        if match := re.match(r"(.*attn)\.([qkv])_proj\.(weight|bias)", new):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = value
        else:
            found[new] = value
    return found | {name: torch.cat([part[x] for x in "qkv"]) for name, part in joined.items()}


def _swapped(weight: Tensor) -> Tensor:
    scale, shift = weight.chunk(2)
    return torch.cat([shift, scale])


def _sd3(weights: Weights) -> Weights:
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj.": "x_embedder.proj.",
        "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
        "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    }
    block = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    joined = {
        "attn.to_": "x_block.attn",
        "attn.add_": "context_block.attn",
        "attn2.to_": "x_block.attn2",
    }
    last = max(int(n.split(".")[1]) for n in weights if n.startswith("transformer_blocks"))
    found = _blocks(weights, "transformer_blocks", "joint_blocks", block, joined, names)
    for name in ("weight", "bias"):
        for key in (
            f"joint_blocks.{last}.context_block.adaLN_modulation.1.{name}",
            f"final_layer.adaLN_modulation.1.{name}",
        ):
            found[key] = _swapped(found[key])
        found[f"final_layer.linear.{name}"] = found.pop(f"proj_out.{name}")
    return found


def _blocks(
    weights: Weights,
    old: str,
    new: str,
    block: Mapping[str, str],
    joined: Mapping[str, str],
    names: Mapping[str, str],
) -> Weights:
    """Rename the layers of blocks, join queries, keys and values, and rename the rest."""
    found: Weights = {}
    triples: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if match := re.fullmatch(rf"{old}\.(\d+)\.(.+)\.(weight|bias)", name):
            number, layer, kind = match.groups()
            start = next((s for s in joined if re.fullmatch(rf"{s}[qkvm](_proj|lp)?", layer)), None)
            if layer == "proj_mlp" and "proj_mlp" in joined:
                start, letter = "proj_mlp", "z"
            elif start is not None:
                letter = layer.removeprefix(start)[0]
            if start is None:
                found[f"{new}.{number}.{block.get(layer, layer)}.{kind}"] = value
            else:
                own = joined[start]
                own = own if own.endswith("linear1") else f"{own}.qkv"
                triples.setdefault(f"{new}.{number}.{own}.{kind}", {})[letter] = value
            continue
        for start, own in names.items():
            if name.startswith(start):
                name = own + name.removeprefix(start)
                break
        found[name] = value
    return found | {
        name: torch.cat([part[letter] for letter in sorted(part, key="qkvz".index)])
        for name, part in triples.items()
    }


def _flux(weights: Weights, config: Any) -> Weights:
    names = {
        "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
        "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
        "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
        "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
        "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
        "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
        "context_embedder.": "txt_in.",
        "x_embedder.": "img_in.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
    }
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    single = {
        "norm.linear": "modulation.lin",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
        "proj_out": "linear2",
    }
    found = _blocks(
        weights,
        "single_transformer_blocks",
        "single_blocks",
        single,
        {"attn.to_": "linear1", "proj_mlp": "linear1"},
        {},
    )
    joined = {"attn.to_": "img_attn", "attn.add_": "txt_attn"}
    found = _blocks(found, "transformer_blocks", "double_blocks", double, joined, names)
    for name in ("weight", "bias"):
        key = f"final_layer.adaLN_modulation.1.{name}"
        found[key] = _swapped(found[key])
    return _apart({re.sub(r"(_norm)\.weight$", r"\1.scale", n): v for n, v in found.items()})
