"""Rewards of pictures, [B, 3, H, W] in [0, 1], some of them given the prompt."""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.clip import CLIPEncoder
from domains.text_to_image.jpeg import check_quality, coded_bytes, quantisation_tables
from domains.text_to_image.shapes.detector import Judgement, judge
from domains.text_to_image.shapes.world import SIZE, TASKS, Prompt, parse
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.images import check_pictures, to_image

__all__ = [
    "Brightness",
    "CLIPScore",
    "Colourfulness",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "ShapesEval",
    "SmoothJPEGCompressibility",
    "Symmetry",
    "check_pictures",
    "prompts_of",
]


class ShapesEval(Reward):
    """Whether a picture of the shapes world shows what the prompt says, by detection.

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
        height, width = pictures.shape[-2:]
        if height != width:
            raise UsageError(
                f"{self.name} judges square pictures, got {height} x {width}; set "
                "pipeline.init_args.height and width to the same size"
            )
        pictures = pictures.detach().float()
        if height != SIZE:
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="area")
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return [judge(array, prompt) for array, prompt in zip(arrays, prompts, strict=True)]


class CLIPScore(Reward):
    """Cosine between CLIP's embeddings of picture and prompt: cos(f(x), g(c)), in [-1, 1].

    Not scaled: CLIP's logits are about 100 times, torchmetrics' CLIPScore max(0, 100 times) this.
    That one is not used here because its processor rounds pictures to bytes on the CPU, which
    stops gradients, encodes every text anew, and knows only a few models by name.

    Args:
        pretrained: A CLIP folder, a hub id (e.g. openai/clip-vit-base-patch32), or "shapes_clip",
            the embedded model of the shapes world.

    Raises:
        UsageError: `pretrained` is no CLIP.

    References:
        Learning Transferable Visual Models From Natural Language Supervision (Radford et al.,
        2021), https://arxiv.org/abs/2103.00020
    """

    differentiable = True

    def __init__(self, pretrained: str = "shapes_clip") -> None:
        super().__init__()
        self.encoder = CLIPEncoder(pretrained)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the cosine of each picture and its prompt, [B]."""
        pictures = check_pictures(samples, condition)
        texts = self.encoder.embed_texts(prompts_of(condition))
        images = self.encoder.embed_pictures(pictures)
        return (images * texts).sum(dim=-1).to(pictures.device)


class JPEGCompressibility(Reward):
    """Minus the size of the picture as a JPEG file, in kilobytes of 1000 bytes.

    Encoded by PIL with 4:2:0 chroma subsampling, its default.

    Args:
        quality: JPEG quality, 1 to 100.

    References:
        Training Diffusion Models with Reinforcement Learning (Black et al., 2023),
        https://arxiv.org/abs/2305.13301
    """

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        self.quality = check_quality(quality)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return minus the file size of each picture, [B], in kilobytes."""
        pictures = check_pictures(samples, condition)
        sizes = [_jpeg_bytes(picture, self.quality) for picture in pictures.detach().cpu()]
        return -_column(sizes).to(pictures.device) / 1000


class JPEGIncompressibility(JPEGCompressibility):
    """The size of the picture as a JPEG file, in kilobytes: the negative of JPEGCompressibility.

    Args:
        quality: JPEG quality, 1 to 100.
    """

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the file size of each picture, [B], in kilobytes."""
        return -super().forward(samples, condition)


class SmoothJPEGCompressibility(Reward):
    """Minus the estimated size of the picture as a JPEG file, in kilobytes of 1000 bytes.

    JPEGCompressibility made differentiable: everything up to the quantisation is that of the file,
    and the cost of a coefficient is a smooth function of it; see `domains.text_to_image.jpeg`.

    Args:
        quality: JPEG quality, 1 to 100.

    Raises:
        UsageError: The quality is out of range.

    References:
        Training Diffusion Models with Reinforcement Learning (Black et al., 2023),
        https://arxiv.org/abs/2305.13301
        Digital compression and coding of continuous-tone still images (ITU-T T.81, 1992),
        https://www.w3.org/Graphics/JPEG/itu-t81.pdf
    """

    differentiable = True
    tables: Tensor

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        # Integers, so that a module converted to half precision keeps them.
        self.register_buffer("tables", quantisation_tables(quality), persistent=False)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return minus the estimated size of each picture, [B], in kilobytes, below -0.6."""
        pictures = check_pictures(samples, condition)
        return -coded_bytes(pictures, self.tables) / 1000


class Brightness(Reward):
    """Mean luma, in [0, 1]: r(x) = mean(0.299 R + 0.587 G + 0.114 B) over pixels.

    References:
        Studio encoding parameters of digital television (ITU-R BT.601-7, 2011), section 2.5.1,
        https://www.itu.int/rec/R-REC-BT.601
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the brightness of each picture, [B]."""
        r, g, b = check_pictures(samples, condition).flatten(2).mean(dim=2).unbind(1)
        return 0.299 * r + 0.587 * g + 0.114 * b


class Colourfulness(Reward):
    """Colourfulness of pictures, in [0, 1.2], 0 for grey ones.

    r(x) = sqrt(var(u) + var(v)) + 0.3 sqrt(mean(u)^2 + mean(v)^2) over pixels, of the opponent
    colours u = R - G and v = (R + G) / 2 - B. The paper measures on colours up to 255, where 33 is
    moderately and 109 extremely colourful: 0.13 and 0.43 here.

    References:
        Measuring colourfulness in natural images (Hasler, Suesstrunk, 2003),
        https://doi.org/10.1117/12.477378
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the colourfulness of each picture, [B]."""
        r, g, b = check_pictures(samples, condition).flatten(2).unbind(1)
        opponents = torch.stack([r - g, (r + g) / 2 - b])
        spread = opponents.var(dim=-1, correction=0).sum(dim=0)
        mean = opponents.mean(dim=-1).square().sum(dim=0)
        return _smooth_sqrt(spread) + 0.3 * _smooth_sqrt(mean)


class Symmetry(Reward):
    """Minus the mean absolute difference of a picture and its mirror image, in [-1, 0].

    r(x) = -mean |x - flip(x)| over channels and pixels; the mirror swaps left and right.
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the symmetry of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        return -(pictures - pictures.flip(-1)).abs().flatten(1).mean(dim=1)


def prompts_of(condition: Condition) -> list[str]:
    """Return the prompt of every sample.

    Raises:
        UsageError: The conditions have no prompts.
    """
    records = condition.each()
    for record in records:
        if "prompt" not in record:
            raise UsageError(
                f"this reward needs a 'prompt' for each sample, but the data only have "
                f"{sorted(record)}; use data with prompts or a reward that needs none"
            )
    return [record["prompt"] for record in records]


@lru_cache(maxsize=16384)
def _parse(text: str) -> Prompt:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(
            f"ShapesEval cannot read the prompt {text!r}, since it only knows the grammar of the "
            "shapes world (such as 'a circle above a ring'); use CLIPScore for free text"
        ) from error


def _column(values: Sequence[float]) -> Tensor:
    # float32 whatever the default dtype, which half-precision trainers change.
    return torch.tensor(values, dtype=torch.float32)


def _smooth_sqrt(values: Tensor, eps: float = 1e-8) -> Tensor:
    # 0 at 0, where the gradient of sqrt is infinite; elsewhere at most sqrt(eps) too low.
    return (values + eps).sqrt() - eps**0.5


def _jpeg_bytes(picture: Tensor, quality: int) -> int:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.tell()
