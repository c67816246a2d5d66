"""Frozen networks of transformers that find named things in a picture, and how deep they lie."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

from domains.text_to_image.networks.automatic import read_auto
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.images import to_image
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["DepthEstimator", "OpenVocabulary"]


class OpenVocabulary(Frozen):
    """An open-vocabulary detector, OWL-ViT or OWLv2: boxes of things that are given by name.

    Args:
        source: A folder or hub id that AutoModelForZeroShotObjectDetection and AutoProcessor read.
        dtype: Precision of the weights.

    Raises:
        ValueError, OSError: It is no such model.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        loaded = _loaded(source, AutoModelForZeroShotObjectDetection, AutoProcessor, dtype)
        self.model, self.processor = loaded
        if self.model.config.model_type not in ("owlvit", "owlv2"):
            raise ValueError(f"its model_type is {self.model.config.model_type!r}, not owlv2")

    @torch.no_grad()
    def forward(self, picture: Tensor, names: Sequence[str], threshold: float) -> list[Tensor]:
        """Return scores and boxes of each named thing, [n, 5], the surest first.

        A row is score, left, top, right, bottom, in pixels of the picture.

        Args:
            picture: [3, H, W] in [0, 1].
            names: What to look for.
            threshold: Least score.
        """
        weight = next(self.model.parameters())
        texts = [f"a photo of a {name}" for name in names]
        image = [to_image(picture)]
        read = self.processor(text=[texts], images=image, return_tensors="pt", truncation=True).to(
            weight.device
        )
        read["pixel_values"] = read["pixel_values"].to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            out = self.model(**read)
        found = self.processor.post_process_grounded_object_detection(
            out, threshold=threshold, target_sizes=[tuple(picture.shape[-2:])]
        )[0]
        rows = torch.cat([found["scores"][:, None], found["boxes"]], dim=1).float().cpu()
        labels = found["labels"].cpu()
        own = [rows[labels == number] for number in range(len(names))]
        return [part[part[:, 0].argsort(descending=True, stable=True)] for part in own]


class DepthEstimator(Frozen):
    """How near each pixel of a picture is, as MiDaS and DPT say it: larger is nearer.

    Args:
        source: A folder or hub id that AutoModelForDepthEstimation and AutoImageProcessor read.
        dtype: Precision of the weights.

    Raises:
        ValueError, OSError: It is no such model.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        loaded = _loaded(source, AutoModelForDepthEstimation, AutoImageProcessor, dtype)
        self.model, self.processor = loaded

    @torch.no_grad()
    def forward(self, picture: Tensor) -> Tensor:
        """Return the nearness of each pixel of a picture [3, H, W], [H, W] in [0, 1]."""
        weight = next(self.model.parameters())
        read = self.processor(images=[to_image(picture)], return_tensors="pt")
        with torch.autocast(weight.device.type, enabled=False):
            pixels = read["pixel_values"].to(weight.device, weight.dtype)
            depth = self.model(pixel_values=pixels).predicted_depth.float()
        low, high = depth.aminmax()
        depth = (depth - low) / (high - low).clamp(min=1e-12)
        depth = F.interpolate(depth[:, None], picture.shape[-2:], mode="bilinear")
        return depth[0, 0].cpu()


def _loaded(source: str, kind: Any, reader: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a model and its processor."""
    if weightless():
        with check_cached(source, "detector"):
            config = read_auto(AutoConfig, source, local_files_only=True)
            processor = read_auto(reader, source, local_files_only=True)
        with torch.device("meta"):
            return frozen(kind.from_config(config, trust_remote_code=False).to(dtype)), processor
    processor = read_auto(reader, source)
    model, info = read_auto(kind, source, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    return frozen(model), processor
