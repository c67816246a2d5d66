"""Rewards of the shapes world: whether a picture shows its prompt, by detection or by a network."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image import EMBEDDED
from domains.text_to_image.samples import check_pictures, prompts_of, square
from domains.text_to_image.shapes.classifier import Classifier, encode
from domains.text_to_image.shapes.detector import Judgement, judge
from domains.text_to_image.shapes.world import SIZE, TASKS, Prompt, parse
from lit_rlft.core.checks import UsageError, reading
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.judge import Judge, Output
from lit_rlft.kit.network_folder import load_pretrained

__all__ = ["ShapesClassifier", "ShapesEval"]


class ShapesEval(Reward):
    """Whether a picture of the shapes world shows what the prompt says, by detection, in [0, 1].

    GenEval in miniature: a detector finds the figures and compares their shapes, number, colours
    and positions with the prompt. Pictures of other sizes are pooled or repeated to 64 x 64; they
    must be square, since squeezing would turn one shape into another.

    Args:
        graded: Give partial credit, a number in [0, 1] that is 1 for correct pictures only; False
            gives 1 to correct pictures and 0 to all others.

    References:
        GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment
        (Ghosh, Hajishirzi, Schmidt, 2023), https://arxiv.org/abs/2310.11513
    """

    def __init__(self, graded: bool = True) -> None:
        super().__init__()
        self.graded = graded

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B], in [0, 1].

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        pictures, prompts = check_pictures(samples, condition), self._prompts(condition)
        return self._rewards(self._judge(pictures, prompts)).to(pictures.device)

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the score, and the accuracy overall and per task (NaN for other tasks' samples).

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        pictures, prompts = check_pictures(samples, condition), self._prompts(condition)
        judgements = self._judge(pictures, prompts)
        accuracy = _column([judgement.correct for judgement in judgements])
        values = {self.name: self._rewards(judgements), f"{self.name}/accuracy": accuracy}
        for task in TASKS:
            own = torch.tensor([prompt.task == task for prompt in prompts], dtype=torch.bool)
            values[f"{self.name}/accuracy/{task}"] = accuracy.where(own, torch.nan)
        return {name: value.to(pictures.device) for name, value in values.items()}

    def _rewards(self, judgements: list[Judgement]) -> Tensor:
        return _column([j.score if self.graded else j.correct for j in judgements])

    def _prompts(self, condition: Condition) -> list[Prompt]:
        return [_parse(text) for text in prompts_of(condition)]

    def _judge(self, pictures: Tensor, prompts: list[Prompt]) -> list[Judgement]:
        pictures = square(pictures.detach().float(), SIZE, self.name)
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return [judge(array, prompt) for array, prompt in zip(arrays, prompts, strict=True)]


class ShapesClassifier(Judge):
    """How sure a small network is that a picture shows its prompt alone, in (-inf, 0] by default.

    VQAScore in miniature: P("yes" | picture, "does this show {prompt}?"), from a network that was
    trained on true pictures and near misses of the shapes world. Pictures of other sizes are pooled
    or repeated to 64 x 64; they must be square.

    The default is the logarithm: with p = sigmoid(z), dp/dz = p (1 - p) all but vanishes where the
    picture is wrong, and nothing would be learned from it; d log p / dz = 1 - p is largest there
    and falls to 0 once the answer is yes, so there is little to gain from pushing further.

    The network is frozen, always in evaluation mode, and computes in the precision of its weights,
    float32 unless they are converted, also under autocast.

    Args:
        pretrained: A folder that `Classifier.save` wrote, or "shapes_classifier", the embedded one.
        output: "log_probability" is in (-inf, 0], "probability" in [0, 1], and "logit", their
            log-odds, has no bounds.

    Raises:
        UsageError: `pretrained` is no such folder, or `output` is unknown.

    References:
        Evaluating Text-to-Visual Generation with Image-to-Text Generation (Lin et al., 2024),
        https://arxiv.org/abs/2404.01291
    """

    def __init__(
        self, pretrained: str = "shapes_classifier", output: Output = "log_probability"
    ) -> None:
        super().__init__(output)
        with reading(self, "pretrained"):
            self.classifier = frozen(_load(pretrained))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the log-probability (or what `output` says) of "yes" of each picture, [B].

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        return self.verdict(self._logits(samples, condition))

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward, and the probability of "yes" for any `output`.

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        logits = self._logits(samples, condition)
        probability = logits.sigmoid()
        return {self.name: self.verdict(logits), f"{self.name}/probability": probability}

    def _logits(self, samples: Any, condition: Condition) -> Tensor:
        pictures = check_pictures(samples, condition)
        codes = torch.stack([_code(text) for text in prompts_of(condition)])
        weight = self.classifier.places.weight
        with torch.autocast(weight.device.type, enabled=False):
            pixels = square(pictures.to(weight.device, weight.dtype), SIZE, self.name)
            logits = self.classifier(pixels, codes.to(weight.device))
        return logits.float().to(pictures.device)


@lru_cache(maxsize=16384)
def _parse(text: str) -> Prompt:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(
            f"ShapesEval cannot read the prompt {text!r}, since it only knows the grammar of the "
            "shapes world (such as 'a circle above a ring'); use CLIPScore for free text"
        ) from error


@lru_cache(maxsize=16384)
def _code(text: str) -> Tensor:
    try:
        return encode(parse(text))
    except ValueError as error:
        raise UsageError(
            f"ShapesClassifier cannot read the prompt {text!r}, since it only knows the grammar of "
            "the shapes world (such as 'a red circle and a blue ring'); use CLIPScore for free "
            "text"
        ) from error


def _load(pretrained: str) -> Classifier:
    return load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: Classifier.load(Path(source)),
        kind="a classifier of the shapes world",
        give="'shapes_classifier' or a folder that Classifier.save wrote",
        key="pretrained",
    )


def _column(values: Sequence[float]) -> Tensor:
    # float32 whatever the default dtype, which half-precision trainers change.
    return torch.tensor(values, dtype=torch.float32)
