"""BLIP-VQA: whether a picture shows every thing that its prompt names, as T2I-CompBench asks it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering, ImageProcessingMixin

from domains.text_to_image.networks.clip import Precision, Preprocessing, precision
from domains.text_to_image.networks.texts import TextReader
from domains.text_to_image.phrases import noun_phrases
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import at_least
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen, frozen

__all__ = ["BLIPVQA"]

_LENGTH = 35
"""Tokens of a question, as published."""


class BLIPVQA(Frozen, Reward):
    r"""BLIP-VQA: the product of P(yes) of the questions "<noun phrase>?", in [0, 1].

    BLIP is asked about each noun phrase of the prompt, such as "a green bench?", and P(yes) is
    taken over yes and no, as the first token of the answer. T2I-CompBench's score of attributes.
    Differentiable.

    The benchmark asks BLIP-VQA with CapFilt-L at 480 pixels, and spaCy finds the phrases. The model
    on the hub sees 384 pixels; phrases are found by simple rules, or by a function of yours. For
    spaCy's: lambda text: [chunk.text for chunk in nlp(text).noun_chunks].

    Args:
        pretrained: Folder or hub id of a BlipForQuestionAnswering. Licence: BSD-3-Clause.
        phrases: Path of a function from a prompt to the list of its noun phrases; None takes the
            rules of `noun_phrases`, which fit the benchmark's prompts.
        batch_size: Questions at a time, which bounds the memory.
        dtype: Precision of the weights.

    Raises:
        UsageError: `pretrained` is no such model.

    References:
        T2I-CompBench (Huang et al., 2023), https://arxiv.org/abs/2307.06350
        BLIP (Li et al., 2022), https://arxiv.org/abs/2201.12086
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "Salesforce/blip-vqa-base",
        phrases: Callable[[str], Sequence[str]] | None = None,
        *,
        batch_size: int = 32,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        self.phrases, self.batch_size = phrases or noun_phrases, batch_size
        give = "the folder or hub id of a BlipForQuestionAnswering"
        with reading("pretrained", pretrained, "a BLIP for questions", give):
            words: Any = AutoTokenizer.from_pretrained(pretrained)
            config, _ = ImageProcessingMixin.get_image_processor_dict(pretrained)
            loaded: Any = BlipForQuestionAnswering.from_pretrained(
                pretrained, dtype=torch.float32, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
            self.yes, self.no = (_token(words, answer) for answer in ("yes", "no"))
        self.network = frozen(model).to(precision(self, dtype))
        self.preprocess = Preprocessing.from_config({**config, "do_center_crop": False})
        length = min(_LENGTH, model.config.text_config.max_position_embeddings)
        self.reader = TextReader(words, length, self.name)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]; 1 where the prompt names nothing."""
        pictures = check_pictures(samples, condition)
        asked = [[f"{phrase}?" for phrase in self.phrases(p)] for p in prompts_of(condition)]
        rows = [i for i, own in enumerate(asked) for _ in own]
        questions = [question for own in asked for question in own]
        states = self._looked_at(pictures)
        answers = [
            self.probability(
                states[rows[i : i + self.batch_size]], questions[i : i + self.batch_size]
            )
            for i in range(0, len(questions), self.batch_size)
        ]
        scores = torch.ones(len(pictures), device=states.device, dtype=pictures.dtype)
        if answers:
            found, places = torch.cat(answers).to(scores.dtype), torch.tensor(rows)
            parts = [found[places == i].prod() for i in range(len(pictures))]
            scores = torch.stack(parts)
        return scores.to(pictures.device)

    def probability(self, states: Tensor, questions: Sequence[str]) -> Tensor:
        """Return P(yes) over yes and no, [B], in float32 or more.

        Args:
            states: The looked-at picture of each question, [B, patches, D].
            questions: One for each.
        """
        model, texts = self.network, self.network.config.text_config
        read = self.reader(questions)
        ids, mask = (read[name].to(states.device) for name in ("input_ids", "attention_mask"))
        # BLIP's questions begin with a mark of their own, the last but one of its vocabulary.
        ids[:, 0] = texts.vocab_size - 1
        with torch.autocast(states.device.type, enabled=False):
            question = model.text_encoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones_like(states[..., 0], dtype=torch.long),
                is_decoder=False,
            ).last_hidden_state
            start = torch.full((len(ids), 1), texts.bos_token_id, device=states.device)
            logits = model.text_decoder(
                input_ids=start, encoder_hidden_states=question, encoder_attention_mask=mask
            ).logits[:, 0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (logits[:, self.yes] - logits[:, self.no]).sigmoid()

    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Return the states of all patches, each picture's once, [B, patches, D]."""
        weight = next(self.network.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            parts = [
                self.network.vision_model(
                    pixel_values=self.preprocess(part.to(weight.device)).to(weight.dtype)
                ).last_hidden_state
                for part in torch.split(pictures, self.batch_size)
            ]
        return torch.cat(parts)


def _token(words: Any, answer: str) -> int:
    ids = words.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"its tokenizer has no single token for {answer!r}")
    return ids[0]
