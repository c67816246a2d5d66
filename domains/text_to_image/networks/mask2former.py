"""A frozen Mask2Former of transformers: the objects in a picture, with boxes and masks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    Mask2FormerForUniversalSegmentation,
)

from domains.text_to_image.networks.automatic import read_auto
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.images import to_image
from lit_rlft.kit.weightless import check_cached, weightless

__all__ = ["Mask2Former"]

_ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""COCO's classes have several spellings; these are GenEval's."""
_MOST = 100
"""Objects of a picture that are kept, as mmdet and COCO's evaluation do."""


class Mask2Former(Frozen):
    """Instance segmentation of COCO's 80 classes.

    An object's score is the probability of its class times the mean probability of its mask's
    pixels, as mmdet and detectron2 have it; its box is its mask's.

    Args:
        source: A folder or hub id of a Mask2FormerForUniversalSegmentation with its
            preprocessor_config.json.
        dtype: Precision of the weights.

    Attributes:
        classes: Names of the classes, in GenEval's spelling.

    Raises:
        ValueError, OSError: It is no such model.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.processor: Any
        if weightless():
            with check_cached(source, "detector"):
                config = read_auto(AutoConfig, source, local_files_only=True)
                self.processor = read_auto(AutoImageProcessor, source, local_files_only=True)
            with torch.device("meta"):
                model: Any = Mask2FormerForUniversalSegmentation(config).to(dtype)
        else:
            kind = read_auto(AutoConfig, source).model_type
            if kind != "mask2former":
                raise ValueError(f"its config.json has model_type {kind!r}, not 'mask2former'")
            self.processor = read_auto(AutoImageProcessor, source)
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        self.model = frozen(model)
        labels = model.config.id2label
        names = [labels[i].strip().lower() for i in range(len(labels))]
        self.classes = tuple(_ALIASES.get(name, name) for name in names)

    @torch.no_grad()
    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objects of one picture [3, H, W] in [0, 1].

        Returns:
            Scores in [0, 1], [n], falling; classes, int64 [n]; masks, bool [n, H, W].
        """
        weight = next(self.model.parameters())
        read = self.processor(images=[to_image(picture)], return_tensors="pt")
        with torch.autocast(weight.device.type, enabled=False):
            pixels = read["pixel_values"].to(weight.device, weight.dtype)
            found = self.model(pixel_values=pixels)
        masks = F.interpolate(
            found.masks_queries_logits.float(), pixels.shape[-2:], mode="bilinear"
        )
        known = read.get("pixel_mask")
        if known is not None:  # the processor pads at the bottom and on the right
            height, width = (int(known[0].any(dim=d).sum()) for d in (1, 0))
            masks = masks[..., :height, :width]
        masks = F.interpolate(masks, picture.shape[-2:], mode="bilinear")[0]
        return instances(found.class_queries_logits[0].float(), masks)


def instances(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [n], classes [n] and masks [n, H, W] of the objects, the surest first.

    Args:
        logits: Of each query's class, the last of which is none, [Q, C + 1].
        masks: Logits of each query's pixels, [Q, H, W].
    """
    num_classes = logits.shape[1] - 1
    likely = logits.softmax(dim=-1)[:, :-1].flatten()
    scores, places = likely.topk(min(_MOST, len(likely)))
    queries, classes = places // num_classes, places % num_classes
    inside = masks > 0
    sizes = inside.sum(dim=(1, 2))
    sure = (masks.sigmoid() * inside).sum(dim=(1, 2)) / (sizes + 1e-6)
    scores = scores * sure[queries]
    kept = (sizes[queries] > 0).nonzero().squeeze(1)
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return scores[kept], classes[kept], inside[queries[kept]]
