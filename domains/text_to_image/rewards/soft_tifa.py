"""Soft-TIFA: how sure a vision-language model is of each thing that a prompt asks for."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from domains.text_to_image.networks.vision_language import VisionLanguage
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import UsageError, at_least, one_of, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.state import slices
from lit_rlft.kit.frozen import Frozen

__all__ = ["QUESTIONS", "SoftTIFA", "question_problem"]

QUESTIONS = "vqa_list"
"""The column of a prompt's questions and answers."""

_HOLE = "{}"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Average = Literal["geometric", "arithmetic"]


class SoftTIFA(Frozen, Reward):
    """The mean probability of the right answers to a prompt's questions, in [0, 1].

    Each prompt brings questions about single things it asks for, and their answers, under
    `vqa_list` of its record: [["How many dogs are there?", "two"], ["Is a dog red?", "Yes"]]. An
    answer's probability is that of the first token of its spellings: with a large first letter or
    a small one, with a blank before it or none, numbers up to ten in digits too. The geometric mean
    is near 0 where one thing is missing. Protocol of GenEval 2, whose published numbers are of
    Qwen3-VL-8B: those of other models do not compare.

    Differentiable where the model's processor gives every picture one size (LLaVA 1.5, PaliGemma),
    and for Qwen2-VL and its kin.

    Args:
        pretrained: Folder or hub id of an image-text-to-text model; its licence is its own
            (Apache-2.0 for Qwen3-VL-8B).
        average: Over a prompt's questions: "geometric", the benchmark's, or "arithmetic".
        template: What is asked; {} stands for the question.
        batch_size: Questions asked at a time, which bounds the memory.
        dtype: Precision of the weights.

    Raises:
        UsageError: `pretrained` is no such model.

    References:
        GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation (Kamath et al., 2025),
        https://arxiv.org/abs/2512.16853
    """

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen3-VL-8B-Instruct",
        average: Average = "geometric",
        *,
        template: str = "{} Answer in one word.",
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        one_of(self, "average", get_args(Average), average)
        rule = f"a text with {{}} for the question, got {template!r}"
        require(template.count(_HOLE) == 1, self, "template", rule)
        self.average, self.template, self.batch_size = average, template, batch_size
        kind = precision(self, dtype)
        give = "the folder or hub id of an image-text-to-text model"
        with reading("pretrained", pretrained, "a vision-language model", give):
            self.network = VisionLanguage(pretrained, kind)
        self.differentiable = self.network.differentiable

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B].

        Raises:
            UsageError: A prompt has no questions, or the model no token for an answer.
        """
        return self.averaged(self.log_probabilities(samples, condition))

    def log_probabilities(self, samples: Any, condition: Condition) -> list[Tensor]:
        """Return the log-probability of the right answer to each question of each picture's prompt.

        Raises:
            UsageError: As `forward`.
        """
        pictures = check_pictures(samples, condition)
        asked = [_questions(entry) for entry in condition.each()]
        if not asked:
            return []
        counts = [len(own) for own in asked]
        places = torch.arange(len(asked)).repeat_interleave(torch.tensor(counts))
        pairs = [pair for own in asked for pair in own]
        logs = torch.cat(
            [
                self._answered(pictures[places[part]], pairs[part])
                for part in slices(len(pairs), self.batch_size)
            ]
        )
        return list(logs.to(pictures.device).tensor_split([*accumulate(counts)][:-1]))

    def averaged(self, logs: Sequence[Tensor]) -> Tensor:
        """Return the mean of each picture's probabilities, given their logarithms, [B]."""
        if not logs:
            return torch.empty(0)
        if self.average == "geometric":
            return torch.stack([own.mean().exp() for own in logs])
        return torch.stack([own.exp().mean() for own in logs])

    def _answered(self, pictures: Tensor, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return the log-probability of each pair's answer about its picture, [n]."""
        questions = [self.template.replace(_HOLE, question) for question, _ in pairs]
        found = self.network.answers(pictures, questions)
        own = [
            found[i, self._tokens(answer)].logsumexp(dim=0) for i, (_, answer) in enumerate(pairs)
        ]
        return torch.stack(own)

    def _tokens(self, answer: str) -> list[int]:
        """Return the first tokens of an answer's spellings, each once."""
        words = self.network.reader.tokenizer
        first = [words.encode(text, add_special_tokens=False)[:1] for text in _spellings(answer)]
        # Some tokenizers have a token of its own for a blank, which is not the answer.
        found = {own[0] for own in first if own and words.decode(own).strip()}
        if not found:
            raise UsageError(f"SoftTIFA: the model's tokenizer has no token for {answer!r}")
        return sorted(found)


def _spellings(answer: str) -> list[str]:
    word = answer.strip().lower()
    forms = [word, word.capitalize()]
    if word in _NUMBERS:
        forms.append(str(_NUMBERS.index(word)))
    return [blank + form for form in forms for blank in ("", " ")]


def _questions(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the questions and answers of a prompt's record."""
    if problem := question_problem(entry):
        raise UsageError(
            f"SoftTIFA: the prompt {entry.get('prompt', '')!r} {problem}; give a .jsonl whose "
            f'records have "{QUESTIONS}": [["Is a dog red?", "Yes"], ...], such as GenEval 2\'s'
        )
    return [(question, answer) for question, answer in entry[QUESTIONS]]


def question_problem(entry: Mapping[str, Any]) -> str:
    """Return what is wrong with the questions of a record, nothing where all is right."""
    found = entry.get(QUESTIONS)
    if not isinstance(found, list | tuple) or not found:
        return f"has no questions under {QUESTIONS!r}"
    for pair in found:
        whole = isinstance(pair, list | tuple) and len(pair) == 2
        if not whole or not all(isinstance(text, str) and text.strip() for text in pair):
            return f"has under {QUESTIONS!r} {pair!r}, not a question and its answer"
    return ""
