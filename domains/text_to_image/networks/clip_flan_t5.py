"""CLIP-FlanT5: a T5 that answers questions on a picture, whose patches CLIP has read for it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    ImageProcessingMixin,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.clip import Preprocessing
from domains.text_to_image.networks.state_dicts import (
    check_has,
    load_all,
    model_of,
    read_checkpoint,
)
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["CLIPFlanT5", "is_clip_flan_t5", "on_square"]

_KIND = "clip_t5"
_PLACE = "<image>"
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_BEFORE, _AFTER = f"{_SYSTEM} USER: ", "\n{} ASSISTANT: "
"""What is read before a picture and after it."""
_SEEN, _PROJECTED = "vision_tower.vision_tower.vision_model.", "mm_projector."
"""How names of CLIP's and of the projector's weights begin in a checkpoint."""
_EMBEDDINGS = ("embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Other names of shared.weight."""
_PLACES = f"{_SEEN}embeddings.position_ids"
"""Numbers 0, 1, 2, ..., which older checkpoints hold."""


class CLIPT5Config(T5Config):
    """T5's config, with the fields of CLIP and of the projector beside T5's."""

    model_type = _KIND


class CLIPFlanT5(Frozen):
    """The model of the VQAScore paper, with the weights and the formats of its authors.

    A picture is padded to a square in CLIP's mean colour and resized. The patches of a hidden layer
    of CLIP's vision tower pass a network of two layers and stand between what T5's encoder reads
    before the picture and the question behind it. Both texts end with </s>, as in training.

    Args:
        source: A folder or hub id of a checkpoint whose config.json has model_type "clip_t5", with
            T5's tokenizer. CLIP is what its `mm_vision_tower` names: a folder within this one, any
            other folder, or a hub id. Its weights are taken from the checkpoint if they are there.
        dtype: Precision of the weights.

    Attributes:
        template: The question of the paper; {} stands for the prompt.

    Raises:
        ValueError, OSError: It is no such model; the first missing or unknown key is named.
    """

    differentiable = True
    template = 'Does this figure show "{}"? Please answer yes or no.'

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        with check_cached(source, "pretrained") if weightless() else nullcontext():
            loading: dict[str, Any] = {"local_files_only": weightless()}
            config = _config(source, **loading)
            tower = _tower(source, config)
            self.tokenizer: Any = read_auto(AutoTokenizer, source, config=config, **loading)
            sees: Any = CLIPVisionConfig.from_pretrained(tower, **loading)
            read, _ = ImageProcessingMixin.get_image_processor_dict(tower, **loading)
        self.preprocess = Preprocessing.from_config(read)
        language, vision, projector = _load(source, tower, config, sees, dtype)
        layers = getattr(vision, "vision_model", vision).encoder
        # The layers above the one that is read are not needed.
        layers.layers = layers.layers[: config.mm_vision_select_layer % (len(layers.layers) + 1)]
        self.language, self.vision = frozen(language), frozen(vision)
        self.projector = frozen(projector)

    def check_answers(self, answers: Sequence[str]) -> None:
        """Accept all answers: they may have any number of tokens."""

    def log_probabilities(
        self, pictures: Tensor, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Return the mean log-probability of the tokens of each answer, [B, answers].

        The mark of an answer's end counts as a token. In float32, or float64 where the weights are.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
            answers: The same for all pictures.
        """
        weight = next(self.projector.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            read, mask = self._read(pictures.to(weight.device), questions)
            states = self.language.encoder(inputs_embeds=read, attention_mask=mask)
            found = [self._log_probability(states, mask, answer) for answer in answers]
        return torch.stack(found, dim=1)

    def _read(self, pictures: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the encoder reads, [B, L, D], and its mask, [B, L]."""
        embed, weight = self.language.shared, next(self.projector.parameters())
        pixels = self.preprocess(on_square(pictures, self.preprocess.mean)).to(weight.dtype)
        # Without the first state, which is the whole picture's.
        patches = self.projector(self.vision(pixel_values=pixels).last_hidden_state[:, 1:])
        # A question must not hold the place of a picture.
        asked = [_AFTER.format(question.replace(_PLACE, "")) for question in questions]
        after = self.tokenizer(asked, padding=True, return_tensors="pt").to(weight.device)
        before = self.tokenizer([_BEFORE], return_tensors="pt").to(weight.device)["input_ids"]
        first = embed(before).expand(len(pictures), -1, -1)
        read = torch.cat([first, patches, embed(after["input_ids"])], dim=1)
        seen = after["attention_mask"]
        ones = seen.new_ones(len(pictures), first.shape[1] + patches.shape[1])
        return read, torch.cat([ones, seen], dim=1)

    def _log_probability(self, states: Any, mask: Tensor, answer: str) -> Tensor:
        """Return the mean log-probability of an answer's tokens, [B]."""
        tokens = self.tokenizer([answer], return_tensors="pt")["input_ids"].to(mask.device)
        start = tokens.new_full((1, 1), self.language.config.decoder_start_token_id)
        given = torch.cat([start, tokens[:, :-1]], dim=1).expand(len(mask), -1)
        logits = self.language(
            encoder_outputs=states, attention_mask=mask, decoder_input_ids=given, use_cache=False
        ).logits
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        return exact.gather(2, tokens.expand(len(mask), -1)[..., None]).mean(dim=(1, 2))


def is_clip_flan_t5(source: str) -> bool:
    """Return whether a folder or hub id says that it is a CLIP-FlanT5."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, local_files_only=weightless())
    except (OSError, ValueError):
        return False
    return settings.get("model_type") == _KIND


def on_square(pictures: Tensor, mean: Sequence[float]) -> Tensor:
    """Return pictures [B, 3, H, W] in the middle of a square of a colour, whose bytes are whole.

    Args:
        pictures: In [0, 1].
        mean: The colour, in [0, 1].
    """
    height, width = pictures.shape[-2:]
    side = max(height, width)
    if height == width:
        return pictures
    colour = pictures.new_tensor([int(value * 255) / 255 for value in mean])[:, None, None]
    canvas = colour.expand(len(pictures), -1, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[..., top : top + height, left : left + width] = pictures
    return canvas


def _config(source: str, **loading: Any) -> Any:
    """Return the config of a checkpoint, with the values that training had for absent fields.

    Raises:
        ValueError: It asks for what this class does not do.
    """
    config: Any = CLIPT5Config.from_pretrained(source, **loading)
    known = {
        "mm_vision_tower": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
    }
    for name, value in known.items():
        found = getattr(config, name, value)
        if found is None or value not in (None, found):
            needed = f"has to be {value}" if value else "has to name a CLIP"
            raise ValueError(f"its config.json has {name} {found!r}, which {needed}")
    # Newer releases of transformers tie all T5s; FlanT5's output layer is not its embeddings.
    config.tie_word_embeddings = False
    config.mm_vision_select_layer = getattr(config, "mm_vision_select_layer", -2)
    return config


def _tower(source: str, config: Any) -> str:
    """Return where CLIP is: a folder within the checkpoint's, or as it is named."""
    inside = Path(source).expanduser() / config.mm_vision_tower
    return str(inside) if inside.is_dir() else config.mm_vision_tower


def _load(
    source: str, tower: str, config: Any, sees: Any, dtype: torch.dtype
) -> tuple[Any, Any, nn.Sequential]:
    """Return T5, CLIP's vision tower and the projector."""
    with torch.device("meta"):
        projector = nn.Sequential(
            nn.Linear(sees.hidden_size, config.d_model),
            nn.GELU(),
            nn.Linear(config.d_model, config.d_model),
        )
        if weightless():
            language, vision = T5ForConditionalGeneration(config), CLIPVisionModel(sees)
            return language.to(dtype), vision.to(dtype), projector.to(dtype)
        language_names = _language_names(T5ForConditionalGeneration(config))
        vision_names = _vision_names(CLIPVisionModel(sees))
    state = read_checkpoint(source)
    check_has(state, ["shared.weight", "lm_head.weight", f"{_PROJECTED}0.weight"])
    parts: dict[str, dict[str, Tensor]] = {_SEEN: {}, _PROJECTED: {}, "": {}}
    for name, value in state.items():
        if name not in (*_EMBEDDINGS, _PLACES):
            parts[next(start for start in parts if name.startswith(start))][name] = value
    projector_names = {name: _PROJECTED + name for name in projector.state_dict()}
    load_all(projector, _own(parts[_PROJECTED], projector_names), projector_names)
    given = _own(parts[""], language_names)
    language = model_of(T5ForConditionalGeneration, config, given, language_names, dtype)
    language.encoder.embed_tokens = language.decoder.embed_tokens = language.shared
    if parts[_SEEN]:
        given = _own(parts[_SEEN], vision_names)
        vision = model_of(CLIPVisionModel, sees, given, vision_names, dtype)
    else:
        vision = _named_clip(tower, dtype)
    return language, vision, projector.to(dtype)


def _named_clip(tower: str, dtype: torch.dtype) -> Any:
    """Return the vision tower of a CLIP whose weights are not in the checkpoint."""
    loaded: Any = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    vision, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"the weights of {tower} lack {sorted(info['missing_keys'])[0]}")
    return vision


def _language_names(network: nn.Module) -> dict[str, str]:
    """Return the names in a checkpoint of T5's weights, by T5's own."""
    names = network.state_dict()
    return {name: "shared.weight" if name in _EMBEDDINGS else name for name in names}


def _vision_names(network: nn.Module) -> dict[str, str]:
    """Return the names in a checkpoint of CLIP's weights, by CLIP's own."""
    # Earlier releases of transformers have them one level deeper.
    return {name: _SEEN + name.removeprefix("vision_model.") for name in network.state_dict()}


def _own(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights by a network's own names; others keep theirs."""
    used = set(names.values())
    own = {name: state[theirs] for name, theirs in names.items() if theirs in state}
    return own | {name: value for name, value in state.items() if name not in used}
