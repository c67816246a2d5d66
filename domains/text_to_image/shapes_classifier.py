"""A differentiable reward of the shapes world: whether a picture shows its prompt."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.rewards import prompts_of
from domains.text_to_image.shapes.classifier import Classifier, encode
from domains.text_to_image.shapes.world import SIZE, parse
from lit_rlft.core.checks import UsageError, loading
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.images import check_pictures
from lit_rlft.kit.judge import Judge, Output

__all__ = ["ShapesClassifier"]

_EMBEDDED = Path(__file__).parent / "assets"


class ShapesClassifier(Judge):
    """How sure a small network is that a picture shows what the prompt says, and nothing else.

    VQAScore in miniature: P("yes" | picture, "does this show {prompt}?"), from a network that was
    trained on true pictures and near misses of the shapes world. Pictures of other sizes are pooled
    or repeated to 64 x 64; they must be square.

    The default is the logarithm: with p = sigmoid(z), dp/dz = p (1 - p) all but vanishes where the
    picture is wrong, and nothing would be learned from it; d log p / dz = 1 - p is largest there
    and falls to 0 once the answer is yes, so there is little to gain from pushing further.

    The network is frozen, always in evaluation mode, and computes in the precision of its weights,
    float32 unless they are converted, whatever autocast says.

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
        self.classifier = _load(pretrained)
        self.requires_grad_(False).eval()

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the log-probability (or what `output` says) of "yes" of each picture, [B].

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        return self.verdict(self._logits(samples, condition))

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward, and the probability of "yes" whatever `output` is.

        Raises:
            UsageError: A prompt is outside the grammar, or the pictures are not square.
        """
        logits = self._logits(samples, condition)
        probability = logits.sigmoid()
        return {self.name: self.verdict(logits), f"{self.name}/probability": probability}

    def _logits(self, samples: Any, condition: Condition) -> Tensor:
        pictures = check_pictures(samples, condition)
        codes = torch.stack([_code(text) for text in prompts_of(condition)])
        height, width = pictures.shape[-2:]
        if height != width:
            raise UsageError(
                f"{self.name} sees square pictures, got {height} x {width}; set "
                "pipeline.init_args.height and width to the same size"
            )
        weight = self.classifier.places.weight
        with torch.autocast(weight.device.type, enabled=False):
            pixels = pictures.to(weight.device, weight.dtype)
            if height != SIZE:
                pixels = F.interpolate(pixels, (SIZE, SIZE), mode="area")
            logits = self.classifier(pixels, codes.to(weight.device))
        return logits.float().to(pictures.device)


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
    folder = Path(pretrained)
    if not folder.exists():
        folder = _EMBEDDED / pretrained
    failed = (
        f"pretrained: {pretrained!r} could not be loaded as a classifier of the shapes world; "
        "give 'shapes_classifier' or a folder that Classifier.save wrote"
    )
    with loading(failed):
        return Classifier.load(folder)
