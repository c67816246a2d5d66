"""A frozen vision-language model of transformers: what it would answer to questions on pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from domains.text_to_image.networks.clip import Preprocessing
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.images import to_image
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["VisionLanguage"]

_FIXED = ("CLIPImageProcessor", "SiglipImageProcessor")
"""Processors that give every picture one size."""
_PROBE = (48, 64)
_ROUNDING = 2.6 / 255
"""How far bytes, rounded in each pass of a resizing, may be from their differentiable twin."""


class VisionLanguage(Frozen):
    """A vision-language model that is asked one question on each picture.

    Args:
        source: A folder or hub id that AutoModelForImageTextToText and AutoProcessor read.
        dtype: Precision of the weights.

    Attributes:
        differentiable: Whether gradients reach the pictures: where the processor gives every
            picture one size (LLaVA 1.5, PaliGemma), which is then done in tensors.

    Raises:
        ValueError, OSError: It is no such model.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.processor: Any
        if weightless():
            with check_cached(source, "pretrained"):
                config = AutoConfig.from_pretrained(source, local_files_only=True)
                self.processor = AutoProcessor.from_pretrained(source, local_files_only=True)
            with torch.device("meta"):
                model: Any = AutoModelForImageTextToText.from_config(config).to(dtype)
        else:
            self.processor = AutoProcessor.from_pretrained(source)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        self.model = frozen(model)
        # So that the last token is the same place of all texts.
        self.processor.tokenizer.padding_side = "left"
        self._twin = _twin(self.processor.image_processor)
        self.differentiable = self._twin is not None

    def token(self, answer: str) -> int:
        """Return the token of an answer of one token.

        Raises:
            ValueError: The answer takes several.
        """
        ids = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"its tokenizer has no single token for {answer!r}, but {len(ids)}, and the "
                "probability of an answer is that of its token"
            )
        return ids[0]

    def answers(self, pictures: Tensor, questions: Sequence[str]) -> Tensor:
        """Return log-probabilities of the answers' first token over the vocabulary, [B, V].

        In float32, or float64 where the weights are.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
        """
        weight = next(self.model.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            inputs = self._inputs(pictures.to(weight.device), questions, weight)
            logits = self.model(**inputs, use_cache=False).logits[:, -1]
            exact = torch.promote_types(logits.dtype, torch.float32)
            return logits.to(exact).log_softmax(dim=-1)

    def _inputs(
        self, pictures: Tensor, questions: Sequence[str], weight: Tensor
    ) -> dict[str, Tensor]:
        shown = torch.zeros(pictures.shape, device="cpu") if self._twin else pictures
        read = self.processor(
            text=[self._text(question) for question in questions],
            images=[[to_image(picture)] for picture in shown],
            padding=True,
            return_tensors="pt",
        )
        inputs = {
            name: value.to(weight.device, weight.dtype)
            if value.is_floating_point()
            else value.to(weight.device)
            for name, value in read.items()
        }
        if self._twin is not None:
            inputs["pixel_values"] = self._twin(pictures).to(weight.dtype)
        return inputs

    def _text(self, question: str) -> str:
        """Return the question in the model's own form of a conversation, if it has one."""
        if not getattr(self.processor, "chat_template", None):
            return question
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


def _twin(processor: Any) -> Preprocessing | None:
    """Return the differentiable twin of an image processor; None where there is none."""
    if not type(processor).__name__.startswith(_FIXED):
        return None
    settings = processor.to_dict()
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    twin = Preprocessing.from_config({k: v for k, v in settings.items() if v is not None})
    height, width = _PROBE
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    channels = (rows * 5 + 0 * columns, columns * 4 + 0 * rows, (rows + columns) * 2)
    probe = torch.stack(channels).clamp(max=255)
    picture = probe[None].float() / 255
    made = processor(images=[to_image(picture[0])], return_tensors="pt")["pixel_values"]
    ours = twin(picture)
    close = made.shape == ours.shape and (made - ours).abs().max() < _ROUNDING / min(twin.std)
    return twin if close else None
