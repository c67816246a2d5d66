"""A frozen vision-language model of transformers: what it answers to questions on pictures."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.clip import Preprocessing
from domains.text_to_image.networks.picture_patches import (
    ROUNDING,
    PatchReader,
    probe,
    reads_patches,
)
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.images import to_image
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["VisionLanguage", "inputs_of"]

_FIXED = ("CLIPImageProcessor", "SiglipImageProcessor")
"""Processors that give every picture one size."""
_PROBE = (48, 64)
_TYPES = "mm_token_type_ids"
_BLANK = 16
"""Pixels a side of the pictures that only tell a processor how many there are."""


class Reader(Protocol):
    """Turns pictures [B, 3, H, W] in [0, 1] and a question for each into a model's inputs."""

    tokenizer: Any
    differentiable: bool

    def __call__(self, pictures: Tensor, questions: Sequence[str]) -> dict[str, Tensor]: ...


class VisionLanguage(Frozen):
    """A vision-language model that is asked one question on each picture.

    Args:
        source: A folder or hub id that AutoModelForImageTextToText reads.
        dtype: Precision of the weights.

    Attributes:
        differentiable: Whether gradients reach the pictures: of LLaVA 1.5 and PaliGemma, whose
            processors give every picture one size, and of Qwen2-VL and its kin.
        template: The question of VQAScore; {} stands for the prompt.

    Raises:
        ValueError, OSError: It is no such model.
    """

    template = 'Does this figure show "{}"? Please answer Yes or No.'

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        if weightless():
            with check_cached(source, "pretrained"):
                config = read_auto(AutoConfig, source, local_files_only=True)
                self.reader = _reader(source, local_files_only=True)
            with torch.device("meta"):
                model: Any = AutoModelForImageTextToText.from_config(
                    config, trust_remote_code=False
                ).to(dtype)
        else:
            self.reader = _reader(source)
            loaded: Any = read_auto(
                AutoModelForImageTextToText, source, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        self.model = frozen(model)
        self.differentiable = self.reader.differentiable

    def token(self, answer: str) -> int:
        """Return the token of an answer of one token.

        Raises:
            ValueError: The answer takes several.
        """
        ids = self.reader.tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"its tokenizer has no single token for {answer!r}, but {len(ids)}, and the "
                "probability of an answer is that of its token"
            )
        return ids[0]

    def check_answers(self, answers: Sequence[str]) -> None:
        """Raise ValueError unless each answer is one token."""
        for answer in answers:
            self.token(answer)

    def log_probabilities(
        self, pictures: Tensor, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Return the log-probability of each answer's token, the first one said, [B, answers].

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
            answers: The same for all pictures.
        """
        return self.answers(pictures, questions)[:, [self.token(answer) for answer in answers]]

    def answers(self, pictures: Tensor, questions: Sequence[str]) -> Tensor:
        """Return log-probabilities of the answers' first token over the vocabulary, [B, V].

        In float32, or float64 where the weights are.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
        """
        weight = next(self.model.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            inputs = self.inputs(pictures, questions)
            logits = self.model(**inputs, use_cache=False).logits[:, -1]
            exact = torch.promote_types(logits.dtype, torch.float32)
            return logits.to(exact).log_softmax(dim=-1)

    @torch.no_grad()
    def says(self, pictures: Tensor, questions: Sequence[str], max_tokens: int) -> list[str]:
        """Return the likeliest answers, word by word, without gradients.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
            max_tokens: Tokens after which an answer is cut off.
        """
        weight, words = next(self.model.parameters()), self.reader.tokenizer
        with torch.autocast(weight.device.type, enabled=False):
            inputs = self.inputs(pictures, questions)
            made = self.model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=_pad(words)
            )
        start = inputs["input_ids"].shape[1]
        return words.batch_decode(made[:, start:], skip_special_tokens=True)

    def inputs(self, pictures: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs in the type and on the device of its weights."""
        return inputs_of(self.model, self.reader, pictures, questions)


def inputs_of(
    model: Any, reader: Reader, pictures: Tensor, questions: Sequence[str]
) -> dict[str, Tensor]:
    """Return a model's inputs in the type and on the device of its weights.

    Args:
        model: One of transformers.
        reader: Makes its inputs.
        pictures: [B, 3, H, W] in [0, 1].
        questions: One for each picture.
    """
    weight = next(model.parameters())
    # Earlier releases of transformers tell pictures from texts without them.
    takes_types = _TYPES in inspect.signature(model.forward).parameters
    read = reader(pictures.to(weight.device), questions)
    return {
        name: value.to(weight.device, weight.dtype)
        if value.is_floating_point()
        else value.to(weight.device)
        for name, value in read.items()
        if name != _TYPES or takes_types
    }


class _ProcessorReader:
    """Reads by a model's own processor; pictures of one size by its differentiable twin.

    Args:
        source: Folder or hub id of the model.
        **loading: Arguments of transformers' loading.
    """

    def __init__(self, source: str, **loading: Any) -> None:
        self.processor: Any = read_auto(AutoProcessor, source, **loading)
        self.tokenizer = self.processor.tokenizer
        # So that the last token is the same place of all texts.
        self.tokenizer.padding_side = "left"
        self.twin = _twin(self.processor.image_processor)
        self.differentiable = self.twin is not None

    def __call__(self, pictures: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        # The twin's pixels take the place of those that are read from small blank pictures.
        shown = torch.zeros(len(pictures), 3, _BLANK, _BLANK) if self.twin else pictures
        read = self.processor(
            text=[self._text(question) for question in questions],
            images=[[to_image(picture)] for picture in shown],
            padding=True,
            return_tensors="pt",
        )
        inputs = dict(read)
        if self.twin is not None:
            inputs["pixel_values"] = self.twin(pictures)
        return inputs

    def _text(self, question: str) -> str:
        """Return the question in the model's own form of a conversation, if it has one."""
        if not getattr(self.processor, "chat_template", None):
            return question
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


def _reader(source: str, **loading: Any) -> Reader:
    if reads_patches(source, **loading):
        return PatchReader(source, **loading)
    return _ProcessorReader(source, **loading)


def _pad(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _twin(processor: Any) -> Preprocessing | None:
    """Return the differentiable twin of an image processor; None where there is none."""
    if not type(processor).__name__.startswith(_FIXED):
        return None
    settings = processor.to_dict()
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    twin = Preprocessing.from_config({k: v for k, v in settings.items() if v is not None})
    picture = probe(*_PROBE)
    made = processor(images=[to_image(picture[0])], return_tensors="pt")["pixel_values"]
    ours = twin(picture)
    close = made.shape == ours.shape and (made - ours).abs().max() < ROUNDING / min(twin.std)
    return twin if close else None
