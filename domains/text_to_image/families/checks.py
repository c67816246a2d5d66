"""What a model must be like for its family to supply all that it needs; each in words."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from domains.text_to_image.networks.weightless import NoTokenizer

__all__ = [
    "clip_problems",
    "latent_problems",
    "left_out",
    "missing",
    "text_problems",
    "unet_problems",
]


def left_out(index: Mapping[str, Any], kind: type) -> dict[str, None]:
    """Return the parts that a model comes without, as arguments of diffusers' loaders.

    diffusers takes null for such a part in its file of names, but wants to be told of it again.

    Args:
        index: What model_index.json holds.
        kind: The pipeline's class in diffusers.
    """
    parameters = inspect.signature(kind).parameters.values()
    own = [each.name for each in parameters if each.default is each.empty]
    absent = [name for name in own if index.get(name) is None]
    return dict.fromkeys([*absent, *(name for name, part in index.items() if part == [None, None])])


def missing(parts: Any, names: Sequence[str]) -> Iterator[str]:
    """Iterate over the parts that a pipeline lacks."""
    for name in names:
        if getattr(parts, name, None) is None:
            yield f"it has no {name}"


def unet_problems(unet: Any, added: tuple[str | None, ...]) -> Iterator[str]:
    """Iterate over what else than latents, timesteps and text a U-Net has to be given.

    Args:
        unet: The U-Net.
        added: The kinds of added conditions that are supplied.
    """
    config = unet.config
    if config["addition_embed_type"] not in added:
        kind = config["addition_embed_type"]
        family = ", as SDXL's has" if kind == "text_time" else ""
        yield f"its U-Net has added conditions{family} (addition_embed_type {kind!r})"
    projected = config["encoder_hid_dim_type"]
    if projected not in (None, "text_proj"):
        yield f"its U-Net needs embeddings of images (encoder_hid_dim_type {projected!r})"
    if unet.class_embedding is not None:
        found = {name: config[name] for name in ("class_embed_type", "num_class_embeds")}
        given = ", ".join(f"{name} {value!r}" for name, value in found.items() if value is not None)
        yield f"its U-Net is conditioned on classes ({given})"
    if config["time_cond_proj_dim"] is not None:
        yield (
            "its U-Net is given the guidance scale, as latent consistency models are "
            f"(time_cond_proj_dim {config['time_cond_proj_dim']})"
        )
    if config["dual_cross_attention"]:
        yield "its U-Net attends to text and images (dual_cross_attention)"


def clip_problems(encoder: Any, tokenizer: Any, which: str = "") -> Iterator[str]:
    """Iterate over what does not fit in a CLIP text encoder and its tokenizer.

    Args:
        encoder: The text encoder.
        tokenizer: Its tokenizer.
        which: Which of several they are, such as "second ".
    """
    if not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
        yield f"its {which}text encoder is a {type(encoder).__name__}, not a CLIPTextModel"
        return
    own = encoder.config
    if not 2 < len(tokenizer) <= own.vocab_size:
        yield (
            f"its {which}tokenizer has {len(tokenizer)} tokens, its text encoder {own.vocab_size}; "
            "they must be of one model"
        )
    if tokenizer.model_max_length > own.max_position_embeddings:
        yield (
            f"its {which}tokenizer's model_max_length {tokenizer.model_max_length} exceeds the "
            f"{own.max_position_embeddings} positions of its text encoder"
        )


def text_problems(
    encoder: Any, tokenizer: Any, width: int, layers: Sequence[int] = (-1,)
) -> Iterator[str]:
    """Iterate over what does not fit in a language model, its tokenizer and a transformer.

    Args:
        encoder: The language model.
        tokenizer: Its tokenizer; that of a model without files is not looked at.
        width: Numbers of a token's features that the transformer reads.
        layers: The language model's layers that the features are of.
    """
    own = encoder.config
    if own.hidden_size * len(layers) != width:
        yield (
            f"its transformer reads text features of {width} numbers, its text encoder makes "
            f"{own.hidden_size * len(layers)}"
        )
    if max(layers) > own.num_hidden_layers:
        yield (
            f"its text encoder has {own.num_hidden_layers} layers, and the features are those of "
            f"layer {max(layers)} too"
        )
    if not isinstance(tokenizer, NoTokenizer) and not 2 < len(tokenizer) <= own.vocab_size:
        yield (
            f"its tokenizer has {len(tokenizer)} tokens, its text encoder {own.vocab_size}; they "
            "must be of one model"
        )


def latent_problems(
    vae: Any,
    read: int,
    returned: int,
    denoiser: str,
    unused: Sequence[str] = (),
    kinds: tuple[type[Any], ...] = (AutoencoderKL, AutoencoderTiny),
) -> Iterator[str]:
    """Iterate over what does not fit in the latents of a denoiser and a VAE.

    Args:
        vae: The VAE.
        read: Channels of latents that the denoiser reads.
        returned: Channels that it returns.
        denoiser: What it is, "U-Net" or "transformer".
        unused: Settings of a VAE that the family leaves out.
        kinds: The VAE's classes that the family has.
    """
    if not isinstance(vae, kinds):
        known = " or ".join(kind.__name__ for kind in kinds)
        yield f"its VAE is a {type(vae).__name__}, not an {known}"
        return
    own = vae.config
    if read != own["latent_channels"]:
        yield (
            f"its {denoiser} reads {read} channels and its VAE has {own['latent_channels']}, so "
            "that it needs a picture or mask beside the noise, as for inpainting, depth or editing"
        )
    if returned != read:
        yield f"its {denoiser} returns {returned} channels of {read}"
    for name in unused:
        if own.get(name):
            yield f"its VAE has a {name}, which its family's pipeline leaves out"
    if not own.get("scaling_factor") and not hasattr(vae, "bn"):  # FLUX.2's has statistics instead
        yield "its VAE has no scaling_factor"
    for name in ("in_channels", "out_channels"):
        if own.get(name, 3) != 3:
            yield f"its VAE is for pictures of {own[name]} channels, not 3 ({name})"
