"""A frozen CLIP: pictures and texts as unit vectors; their cosine tells how well they fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPModel, CLIPTokenizer, ImageProcessingMixin

from domains.text_to_image import EMBEDDED
from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.texts import TextReader
from domains.text_to_image.networks.weightless import NoTokenizer, bare_clip
from domains.text_to_image.precision import Precision, precision
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.network_folder import load_pretrained
from lit_rlft.kit.weightless import weightless

__all__ = ["CLIPEncoder", "CLIPParts", "Preprocessing", "load_clip"]

_MAX_CACHED_TEXTS = 16384
_CHUNK = 256
"""Texts encoded at a time, which bounds the memory of the text tower."""
_MODES: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    """The differentiable twin of transformers' CLIPImageProcessor: resize, crop, normalise.

    `(crop(resize(x)) - mean) / std` for pictures x in [0, 1]; resizing is antialiased as in PIL,
    whose bytes it follows to within their rounding.

    Attributes:
        size: Length of the shortest edge, or height and width; None leaves the size alone.
        crop: Height and width cut from the middle; None cuts nothing.
        mode: Interpolation of the resizing.
        mean: Mean per channel.
        std: Standard deviation per channel.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Read the fields of a preprocessor_config.json; absent ones have OpenAI's values.

        Raises:
            UsageError: A field asks for what this class does not do.
        """
        normalizes = config.get("do_normalize", True)
        mean = config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
        std = config.get("image_std", (0.26862954, 0.26130258, 0.27577711))
        resample = config.get("resample", 3)
        if resample not in _MODES:
            raise UsageError(
                f"preprocessor_config.json has resample {resample}; set 2 (bilinear) or 3 "
                "(bicubic), which have a differentiable twin"
            )
        size = _edges(config.get("size", 224)) if config.get("do_resize", True) else None
        crop = _edges(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None
        return cls(
            size=size,
            crop=(crop, crop) if isinstance(crop, int) else crop,
            mode=_MODES[resample],
            mean=tuple(mean) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(std) if normalizes else (1.0, 1.0, 1.0),
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the vision tower's input for pictures [B, 3, H, W] in [0, 1]."""
        pictures = self._crop(self._resize(pictures))
        mean, std = (pictures.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pictures - mean) / std

    def _resize(self, pictures: Tensor) -> Tensor:
        if self.size is None:
            return pictures
        height, width = pictures.shape[-2:]
        size = self.size
        if isinstance(size, int):
            shortest = min(height, width)
            size = (size * height // shortest, size * width // shortest)
        # As PIL does: across first, and cutting off what bicubic interpolation overshoots at once.
        for shape in ((height, size[1]), size):
            if shape != pictures.shape[-2:]:
                pictures = F.interpolate(pictures, shape, mode=self.mode, antialias=True)
                pictures = pictures.clamp(0, 1)
        return pictures

    def _crop(self, pictures: Tensor) -> Tensor:
        if self.crop is None:
            return pictures
        height, width = self.crop
        top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
        return pictures[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class CLIPParts:
    """What a CLIP consists of.

    Attributes:
        model: A CLIPModel of transformers.
        tokenizer: Its tokenizer.
        preprocess: From pictures [B, 3, H, W] in [0, 1] to the vision tower's input.
    """

    model: Any
    tokenizer: Any
    preprocess: Callable[[Tensor], Tensor]


class CLIPEncoder(Frozen):
    """Both towers of a pretrained CLIP, frozen and always in evaluation mode.

    Works in the precision of its weights, float32 unless they are converted, whatever autocast
    says. Each text is encoded once and remembered; too long ones are cut, counted and said once.

    Args:
        pretrained: A folder or hub id that `CLIPModel.from_pretrained` reads, with tokenizer and
            preprocessor_config.json, or the name of an embedded model ("shapes_clip"); or the
            parts themselves.
        batch_size: Pictures embedded at a time, which bounds the memory of the vision tower.
        dtype: Precision of the weights; the scale of logits stays as it was loaded.

    Attributes:
        reader: Tokenises; its `cut` are the texts that were cut off.

    Raises:
        UsageError: `pretrained` is no CLIP, or lacks parts of one.
    """

    def __init__(
        self,
        pretrained: str | CLIPParts = "shapes_clip",
        *,
        batch_size: int = 256,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        kind = precision(self, dtype)
        parts = pretrained if isinstance(pretrained, CLIPParts) else load_clip(pretrained)
        scale = parts.model.logit_scale.detach().clone()
        self.clip = frozen(parts.model).to(kind)
        self.clip.logit_scale.data = scale  # in bfloat16 its exponential would be 1 % off
        self.tokenizer, self.preprocess = parts.tokenizer, parts.preprocess
        self.batch_size = batch_size
        length = self.clip.config.text_config.max_position_embeddings
        self.reader = TextReader(self.tokenizer, length, "CLIP")
        self._texts: dict[str, Tensor] = {}

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Return unit vectors [B, D] on the encoder's device; gradients flow.

        In float32, or float64 where the weights are.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
        """
        return torch.cat([self._embed(part) for part in torch.split(pictures, self.batch_size)])

    def _embed(self, pictures: Tensor) -> Tensor:
        weight = self.clip.visual_projection.weight
        with torch.autocast(weight.device.type, enabled=False):
            pixels = self.preprocess(pictures.to(weight.device)).to(weight.dtype)
            # Not get_image_features, which returns a tensor or a record by transformers' version.
            pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
            return _unit(self.clip.visual_projection(pooled))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [B, D], as pictures', on the encoder's device, without gradients.

        Texts longer than the model's context are cut off at its end.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _MAX_CACHED_TEXTS:
            self._texts.clear()
            new = list(dict.fromkeys(texts))
        for i in range(0, len(new), _CHUNK):
            part = new[i : i + _CHUNK]
            # Remembered on the CPU, so that moving the encoder leaves nothing behind.
            self._texts.update(zip(part, self._encode(part).cpu(), strict=True))
        device = self.clip.text_projection.weight.device
        return torch.stack([self._texts[text] for text in texts]).to(device)

    # Validation may be the first to see a text, and what it remembers serves training later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        weight = self.clip.text_projection.weight
        if isinstance(self.tokenizer, NoTokenizer):
            return weight.new_empty(len(texts), weight.shape[0], dtype=torch.float32)
        tokens = {name: ids.to(weight.device) for name, ids in self.reader(texts).items()}
        with torch.autocast(weight.device.type, enabled=False):
            return _unit(self.clip.text_projection(self.clip.text_model(**tokens).pooler_output))


def load_clip(
    pretrained: str, *, processor: str | None = None, key: str = "pretrained"
) -> CLIPParts:
    """Load a CLIP.

    Args:
        pretrained: A folder, a hub id or the name of an embedded model.
        processor: Where tokenizer and preprocessor_config.json are; None takes `pretrained`.
        key: The setting, for messages.

    Raises:
        UsageError: It is no CLIP, or lacks parts of one.
    """
    model, tokenizer, config = load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: _load(source, processor, key),
        kind="a CLIP",
        give="'shapes_clip', the folder of a CLIPModel with its tokenizer, or a hub id such as "
        "openai/clip-vit-base-patch32",
        key=key,
    )
    preprocess = Preprocessing.from_config(config)
    made = preprocess.crop or preprocess.size
    wanted = model.config.vision_config.image_size
    if made is not None and made not in (wanted, (wanted, wanted)):
        raise UsageError(
            f"{key}: preprocessor_config.json makes pictures of size {made}, but the "
            f"model's config.json has image_size {wanted}; they must agree"
        )
    return CLIPParts(model, tokenizer, preprocess)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _edges(size: int | Mapping[str, int]) -> int | tuple[int, int]:
    """Return one length or (height, width) of any spelling in a preprocessor_config.json."""
    if isinstance(size, int):
        return size
    if size.get("shortest_edge"):
        return size["shortest_edge"]
    return size["height"], size["width"]


def _load(source: str, processor: str | None, key: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, tokenizer and preprocessor settings.

    transformers fills what a folder lacks with fresh weights or an empty vocabulary.
    """
    if weightless():
        return bare_clip(source, key)
    kind = read_auto(AutoConfig, source).model_type
    if kind != "clip":
        raise ValueError(f"its config.json has model_type {kind!r}, not 'clip'")
    config, _ = ImageProcessingMixin.get_image_processor_dict(processor or source)
    tokenizer = CLIPTokenizer.from_pretrained(processor or source)
    # Embedded weights are stored as float16, which is slow and coarse to compute in.
    loaded: Any = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    if not 2 < len(tokenizer) <= model.config.text_config.vocab_size:
        raise ValueError("its tokenizer files are missing or belong to another model")
    return model, tokenizer, config
