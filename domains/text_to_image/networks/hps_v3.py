"""HPSv3's network: a Qwen2-VL that reads a prompt and a picture, and a head that scores them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from domains.text_to_image.networks.picture_patches import PatchReader
from domains.text_to_image.networks.state_dicts import check_has, load_all, model_of
from domains.text_to_image.networks.vision_language import inputs_of
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["REWARD", "HPSv3Network", "qwen_parts"]

REWARD = "<|Reward|>"
"""The token whose state is scored."""
_PIXELS = 256 * 28 * 28
_HEAD = "rm_head."
_LAYERS = (0, 3, 5)
"""Places of the head's linear layers; ReLUs and dropout stand between them."""
_WIDTHS = (1024, 16, 2)


class HPSv3Network(Frozen):
    """Qwen2-VL and the head on the state of the token <|Reward|>.

    A picture is resized to 200,704 pixels, about 448 x 448, from any size. Positions are those
    of the authors' code: it numbers all tokens in a row, the picture's too, where Qwen2-VL itself
    numbers rows and columns.

    Args:
        state: The authors' state dict; names may be those of any release of transformers. None
            builds the network without weights.
        config: Sizes of Qwen2-VL.
        reader: Makes its inputs; its tokenizer knows <|Reward|>.
        dtype: Precision of Qwen2-VL's weights; the head's is single, as the authors have it.

    Raises:
        ValueError: Keys are missing, or others are there; the first of each is named.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor] | None,
        config: Any,
        reader: PatchReader,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.reader, self.mark = reader, reader.tokenizer.convert_tokens_to_ids(REWARD)
        if state is None:
            with torch.device("meta"):
                model = Qwen2VLForConditionalGeneration(config).to(dtype)
                head = _head(config.get_text_config().hidden_size, _WIDTHS)
        else:
            model, head = _model(state, config, dtype), _loaded_head(state)
        self.model, self.head = frozen(model.model), frozen(head)

    def forward(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Return mean and deviation of the score of each picture, [B, 2].

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            texts: One for each picture, with <|Reward|> once.
        """
        weight = next(self.head.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            inputs = inputs_of(self.model, self.reader, pictures, texts)
            places = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
            states = self.model(
                **inputs, position_ids=places.expand(3, -1, -1), use_cache=False
            ).last_hidden_state
            return self.head(states[inputs["input_ids"] == self.mark].to(weight.dtype))


def qwen_parts(source: str) -> tuple[Any, PatchReader]:
    """Return the config of a Qwen2-VL with the token <|Reward|>, and what reads its inputs.

    Args:
        source: A folder or a hub id, of which no weights are read.

    Raises:
        ValueError, OSError: It is of another model, or files are missing.
    """
    loading: dict[str, Any] = {"local_files_only": weightless()}
    with check_cached(source, "processor") if weightless() else nullcontext():
        settings, _ = PretrainedConfig.get_config_dict(source, **loading)
        if (kind := settings.get("model_type")) != Qwen2VLConfig.model_type:
            raise ValueError(f"its config.json has model_type {kind!r}, not 'qwen2_vl'")
        config: Any = Qwen2VLConfig.from_pretrained(source, **loading)
        reader = PatchReader(source, pixels=_PIXELS, **loading)
    reader.tokenizer.add_tokens([REWARD], special_tokens=True)
    config.get_text_config().vocab_size = len(reader.tokenizer)
    return config, reader


def _model(state: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> Any:
    """Return Qwen2-VL with the weights of a state dict."""
    with torch.device("meta"):
        own = list(Qwen2VLForConditionalGeneration(config).state_dict())
    # Releases of transformers before 4.52 had the two towers one level higher.
    earlier = any(name.startswith("visual.") for name in state)
    names = {name: _earlier(name) if earlier else name for name in own}
    used = set(names.values())
    weights = {name: state[theirs] for name, theirs in names.items() if theirs in state}
    rest = {n: v for n, v in state.items() if n not in used and not n.startswith(_HEAD)}
    return model_of(Qwen2VLForConditionalGeneration, config, weights | rest, names, dtype)


def _earlier(name: str) -> str:
    for now, then in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(now):
            return then + name.removeprefix(now)
    return name


def _head(width: int, widths: Sequence[int]) -> nn.Sequential:
    """Return the head of the authors' code, for states of some width."""
    first, second, last = widths
    return nn.Sequential(
        *(nn.Linear(width, first), nn.ReLU(), nn.Dropout(0.05)),
        *(nn.Linear(first, second), nn.ReLU()),
        nn.Linear(second, last),
    )


def _loaded_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Return the head with the weights of a state dict."""
    names = [f"{_HEAD}{place}.weight" for place in _LAYERS]
    check_has(state, names)
    with torch.device("meta"):
        head = _head(state[names[0]].shape[1], [state[name].shape[0] for name in names])
    weights = {n.removeprefix(_HEAD): v for n, v in state.items() if n.startswith(_HEAD)}
    load_all(head, weights, {name: _HEAD + name for name in head.state_dict()})
    return head
