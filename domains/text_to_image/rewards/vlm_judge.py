"""A vision-language model as a judge: it answers in words, of which the score is read."""

import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.networks.vision_language import VisionLanguage
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import BadArgument, at_least, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen

__all__ = ["VLMJudge"]

_HOLE = "{}"
_RUBRIC = (
    'The picture was made for the text "{}". How well does it show the text, and how good a '
    "picture is it? Look for missing or wrong things, wrong numbers and colours, distorted bodies, "
    'letters and shapes. Reason in one sentence, then write "Score: " and a number from 0 (nothing '
    "fits) to 10 (perfect)."
)
_PATTERN = r"[Ss]core\W*(\d+(?:\.\d+)?)"


class VLMJudge(Frozen, Reward):
    """The score that a vision-language model gives a picture by a rubric, in [0, 1].

    The model answers in words, the likeliest ones; scores are what a pattern finds there. Their
    mean is brought to [0, 1] by the scale's ends. A picture without a score, or with one outside
    the scale, has none: it is left out, counted in `num_failed`, and each process says its
    first such answer. Not differentiable, and slow: each picture costs an answer of up to
    `max_tokens` steps. `VQAScore` needs one.

    Args:
        pretrained: Folder or hub id of an image-text-to-text model; its licence is its own
            (Apache-2.0 for Qwen2.5-VL-7B).
        rubric: What is asked; {} stands for the prompt, and may be left out.
        pattern: Regular expression with one group, the number.
        num_scores: Scores that an answer has to have; of more the last ones count.
        scale: The scale's worst and best score.
        max_tokens: Length of an answer at most.
        batch_size: Pictures asked about at a time, which bounds the memory.
        dtype: Precision of the weights.

    Attributes:
        num_failed: Pictures without a score so far.

    Raises:
        BadArgument: `pattern` is no expression with one group, or another setting is impossible.
        UsageError: `pretrained` is no such model.
    """

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        rubric: str = _RUBRIC,
        pattern: str = _PATTERN,
        num_scores: int = 1,
        scale: tuple[float, float] = (0.0, 10.0),
        max_tokens: int = 128,
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
    ) -> None:
        super().__init__()
        at_least(1, self, num_scores=num_scores, max_tokens=max_tokens, batch_size=batch_size)
        rule = f"a text with {{}} for the prompt once, or without, got {rubric!r}"
        require(len(rubric.strip()) > 0 and rubric.count(_HOLE) <= 1, self, "rubric", rule)
        known = len(scale) == 2 and all(map(math.isfinite, scale)) and scale[0] != scale[1]
        require(known, self, "scale", f"two different numbers, worst first, got {scale}")
        self.pattern = _compiled(self, pattern)
        self.rubric, self.num_scores, self.scale = rubric, num_scores, tuple(scale)
        self.max_tokens, self.batch_size, self.num_failed = max_tokens, batch_size, 0
        kind = precision(self, dtype)
        give = "the folder or hub id of an image-text-to-text model"
        with reading("pretrained", pretrained, "a vision-language model", give):
            self.network = VisionLanguage(pretrained, kind)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]; NaN where the answer has none."""
        pictures = check_pictures(samples, condition)
        asked = [self.rubric.replace(_HOLE, text) for text in prompts_of(condition)]
        scores: list[float] = []
        for start in range(0, len(asked), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers = self.network.says(pictures[part], asked[part], self.max_tokens)
            scores += map(self.score, answers)
        return torch.tensor(scores)

    def score(self, answer: str) -> float:
        """Return the score that an answer gives, in [0, 1]; NaN for none."""
        found = [float(number) for number in self.pattern.findall(answer)][-self.num_scores :]
        low, high = min(self.scale), max(self.scale)
        if len(found) == self.num_scores and all(low <= number <= high for number in found):
            worst, best = self.scale
            return (sum(found) / len(found) - worst) / (best - worst)
        if not self.num_failed:
            # From whichever process: nobody else sees the answer.
            warnings.warn(
                f"VLMJudge: no score in the answer {answer[:200]!r}, so its picture is left out; "
                "further ones are not said. Ask for the score as reward.init_args.pattern reads "
                "it, or raise reward.init_args.max_tokens where answers are cut off",
                stacklevel=2,
            )
        self.num_failed += 1
        return math.nan


def _compiled(owner: object, pattern: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        problem = f"is no regular expression ({error}): {pattern!r}"
        raise BadArgument(owner, "pattern", problem) from error
    rule = f"an expression with one group, the number, got {pattern!r}"
    require(found.groups == 1, owner, "pattern", rule)
    return found
