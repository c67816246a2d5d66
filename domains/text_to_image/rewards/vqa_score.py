"""VQAScore: how sure a vision-language model is that a picture shows its prompt."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from domains.text_to_image.networks.clip_flan_t5 import CLIPFlanT5, is_clip_flan_t5
from domains.text_to_image.networks.vision_language import VisionLanguage
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import at_least, one_of, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen

__all__ = ["VQAScore"]

VQAOutput = Literal["probability", "log_probability", "yes_or_no"]
_HOLE = "{}"


class VQAScore(Frozen, Reward):
    """VQAScore: P("Yes" | picture, "Does this figure show {prompt}?"), in [0, 1].

    Of CLIP-FlanT5, the paper's own model, it is the geometric mean of the probabilities of the
    answer's two tokens, "Yes" and its end. Of any other vision-language model of transformers it
    is the probability of "Yes" as the first token of the answer, over the whole vocabulary:
    template and score of t2v_metrics 3.1. Numbers of different models cannot be compared.

    Differentiable for CLIP-FlanT5, where the model's processor gives every picture one size (LLaVA
    1.5, PaliGemma), and for Qwen2-VL, Qwen2.5-VL and their kin. Other models see pictures as bytes
    through their own processor: `differentiable` is then False.

    Published: CLIP-FlanT5-XXL (XL) has a group score of 46.0 (34.8) on Winoground; the XXL agrees
    with people on 84.0 % of pairs of Pick-a-Pic. P-GRAFT takes Stable Diffusion 2 from 69.20 to
    76.12 (times 100) on T2I-CompBench++'s validation prompts. Licences are the models' own:
    Apache-2.0 for CLIP-FlanT5 and Qwen2.5-VL-7B, Llama 2's for LLaVA 1.5.

    Args:
        pretrained: Folder or hub id of the model: of an image-text-to-text model of transformers,
            or of CLIP-FlanT5 (zhiqiulin/clip-flant5-xl with 3 billion weights, or -xxl with 11).
        output: "probability"; its logarithm, in (-inf, 0], whose gradient does not vanish where
            the answer is no; or "yes_or_no", P("Yes") / (P("Yes") + P("No")) in [0, 1], which is
            not VQAScore and is reported as `YesOrNo`.
        template: The question; {} stands for the prompt. None asks as the model's authors do:
            'Does this figure show "{}"? Please answer Yes or No.', CLIP-FlanT5 in small letters.
        yes: The answer whose probability counts, one token where it is not CLIP-FlanT5's.
        no: The other answer, for "yes_or_no".
        batch_size: Pictures asked about at a time, which bounds the memory.
        dtype: Precision of the weights.

    Raises:
        UsageError: `pretrained` is no such model, or has no single token for an answer.

    References:
        Evaluating Text-to-Visual Generation with Image-to-Text Generation (Lin et al., 2024),
        https://arxiv.org/abs/2404.01291
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        output: VQAOutput = "probability",
        *,
        template: str | None = None,
        yes: str = "Yes",
        no: str = "No",
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        one_of(self, "output", get_args(VQAOutput), output)
        rule = f"a question with {{}} for the prompt, got {template!r}"
        require(template is None or template.count(_HOLE) == 1, self, "template", rule)
        self.output, self.batch_size = output, batch_size
        self.network = _load(pretrained, precision(self, dtype), (yes, no))
        self.yes, self.no = yes, no
        self.template = template or self.network.template
        self.differentiable = self.network.differentiable

    @property
    def name(self) -> str:
        """VQAScore, or YesOrNo for what is not one."""
        return "YesOrNo" if self.output == "yes_or_no" else "VQAScore"

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        questions = [self.template.replace(_HOLE, text) for text in prompts_of(condition)]
        starts = range(0, len(questions), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        scores = [self._score(pictures[part], questions[part]) for part in parts]
        return torch.cat(scores).to(pictures.device) if scores else pictures.new_empty(0)

    def _score(self, pictures: Tensor, questions: list[str]) -> Tensor:
        answers = (self.yes, self.no) if self.output == "yes_or_no" else (self.yes,)
        found = self.network.log_probabilities(pictures, questions, answers)
        if self.output == "yes_or_no":
            return (found[:, 0] - found[:, 1]).sigmoid()
        return found[:, 0] if self.output == "log_probability" else found[:, 0].exp()


def _load(
    pretrained: str, dtype: torch.dtype, answers: tuple[str, ...]
) -> VisionLanguage | CLIPFlanT5:
    """Return the model, which knows the answers."""
    give = "the folder or hub id of an image-text-to-text model, such as llava-1.5-7b-hf"
    kind = "a vision-language model"
    original = is_clip_flan_t5(pretrained)
    if original:
        give, kind = "the folder of one, or the hub id zhiqiulin/clip-flant5-xl", "a CLIP-FlanT5"
    with reading("pretrained", pretrained, kind, give):
        network = (CLIPFlanT5 if original else VisionLanguage)(pretrained, dtype)
        network.check_answers(answers)
    return network
