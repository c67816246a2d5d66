"""A frozen BLIP of transformers that answers questions on pictures with yes or no."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipForQuestionAnswering,
    ImageProcessingMixin,
)

from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.clip import Preprocessing
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["BlipVQA"]

_LENGTH = 35
"""Tokens of a question, as in BLIP's training."""


class BlipVQA(Frozen):
    """P(yes) / (P(yes) + P(no)) of the first word of BLIP's answer to a question.

    As T2I-CompBench asks it: the question's first token is [ENC], the answer's is [DEC], which
    are the last two of BLIP's vocabulary. Works in the precision of its weights.

    Args:
        source: A folder or hub id of a BlipForQuestionAnswering with tokenizer and
            preprocessor_config.json.
        dtype: Precision of the weights.

    Raises:
        ValueError, OSError: It is no such model.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        bare = weightless()
        local = {"local_files_only": True} if bare else {}
        with check_cached(source, "blip") if bare else torch.no_grad():
            config = read_auto(AutoConfig, source, **local)
            if config.model_type != "blip":
                raise ValueError(f"its config.json has model_type {config.model_type!r}")
            self.tokenizer: Any = read_auto(AutoTokenizer, source, **local)
            settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **local)
        if bare:
            with torch.device("meta"):
                model: Any = BlipForQuestionAnswering(config).to(dtype)
        else:
            loaded: Any = BlipForQuestionAnswering.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        self.model = frozen(model)
        self.preprocess = Preprocessing.from_config({**settings, "do_center_crop": False})
        self.yes, self.no = (self._token(word) for word in ("yes", "no"))
        self.start: int = config.text_config.bos_token_id

    def _token(self, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"its tokenizer has no single token for {word!r}, but {len(ids)}")
        return int(ids[0])

    @torch.no_grad()
    def forward(self, pictures: Tensor, questions: Sequence[str]) -> Tensor:
        """Return how likely "yes" is rather than "no", [B] in [0, 1].

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
        """
        weight = next(self.model.parameters())
        read = self.tokenizer(
            list(questions),
            padding=True,
            truncation=True,
            max_length=_LENGTH,
            return_tensors="pt",
        ).to(weight.device)
        read.input_ids[:, 0] = self.start + 1
        with torch.autocast(weight.device.type, enabled=False):
            pixels = self.preprocess(pictures.to(weight.device)).to(weight.dtype)
            patches = self.model.vision_model(pixel_values=pixels).last_hidden_state
            states = self.model.text_encoder(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask,
                encoder_hidden_states=patches,
                encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.int64),
            ).last_hidden_state
            begun = torch.full((len(questions), 1), self.start, device=weight.device)
            logits = self.model.text_decoder(
                input_ids=begun,
                encoder_hidden_states=states,
                encoder_attention_mask=read.attention_mask,
            ).logits[:, -1]
        return (logits[:, self.yes].double() - logits[:, self.no].double()).sigmoid()
