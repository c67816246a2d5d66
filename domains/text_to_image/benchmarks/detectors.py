"""Frozen detectors of transformers: which objects a picture shows, and where."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Mask2FormerForUniversalSegmentation,
    Owlv2ForObjectDetection,
)

from domains.text_to_image.rewards.published import reading
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.images import to_image

__all__ = ["Detector", "Found", "Mask2Former", "OWLv2"]

_MOST = 100
"""Detections of a picture that are kept at most, as in COCO's evaluation."""


@dataclass(frozen=True)
class Found:
    """An object found in a picture.

    Attributes:
        score: How sure the detector is, in [0, 1].
        box: Left, top, right and bottom in pixels.
        mask: Which pixels belong to it, bool [H, W]; None where the detector has boxes alone.
    """

    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


class Detector(Frozen, ABC):
    """Finds objects by their names."""

    @abstractmethod
    def find(
        self, pictures: Tensor, names: Sequence[Sequence[str]], threshold: float
    ) -> list[dict[str, list[Found]]]:
        """Return, for each picture, the objects found by name, the surest first.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            names: What to look for in each picture.
            threshold: Score from which an object counts.

        Raises:
            ValueError: The detector does not know a name.
        """


class Mask2Former(Detector):
    """Mask2Former, instances of COCO's 80 classes with their masks.

    Scores are the class's probability times the mean probability of the mask's pixels. Masks are
    made at the picture's size, and boxes are those of the masks. Licence of the weights: MIT.

    Args:
        pretrained: Folder or hub id.

    Raises:
        UsageError: `pretrained` is no such model.
    """

    def __init__(self, pretrained: str = "facebook/mask2former-swin-small-coco-instance") -> None:
        super().__init__()
        give = "the folder or hub id of a Mask2Former that was trained on COCO's instances"
        with reading("pretrained", pretrained, "a Mask2Former", give):
            self.read: Any = AutoImageProcessor.from_pretrained(pretrained)
            model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(pretrained)
        self.model = frozen(model)
        self.numbers = {name: i for i, name in model.config.id2label.items()}

    @torch.no_grad()
    def find(
        self, pictures: Tensor, names: Sequence[Sequence[str]], threshold: float
    ) -> list[dict[str, list[Found]]]:
        for name in {name for own in names for name in own}:
            if name not in self.numbers:
                raise ValueError(f"the detector knows no {name!r}, only {sorted(self.numbers)}")
        device = next(self.model.parameters()).device
        read = self.read(images=[to_image(picture) for picture in pictures], return_tensors="pt")
        made = self.model(pixel_values=read["pixel_values"].to(device))
        size = tuple(pictures.shape[-2:])
        return [
            _instances(classes, masks, size, {name: self.numbers[name] for name in own}, threshold)
            for classes, masks, own in zip(
                made.class_queries_logits, made.masks_queries_logits, names, strict=True
            )
        ]


class OWLv2(Detector):
    """OWLv2: any object that a text names, as boxes. Licence of the weights: Apache-2.0.

    Args:
        pretrained: Folder or hub id.
        template: What the model is asked for; {} stands for the name.

    Raises:
        UsageError: `pretrained` is no such model.
    """

    def __init__(
        self,
        pretrained: str = "google/owlv2-base-patch16-ensemble",
        template: str = "a photo of a {}",
    ) -> None:
        super().__init__()
        self.template = template
        give = "the folder or hub id of an OWLv2"
        with reading("pretrained", pretrained, "an OWLv2", give):
            self.read: Any = AutoImageProcessor.from_pretrained(pretrained)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(pretrained)
            model: Any = Owlv2ForObjectDetection.from_pretrained(pretrained)
        self.model = frozen(model)

    @torch.no_grad()
    def find(
        self, pictures: Tensor, names: Sequence[Sequence[str]], threshold: float
    ) -> list[dict[str, list[Found]]]:
        return [
            self._find(picture, list(own), threshold) if own else {}
            for picture, own in zip(pictures, names, strict=True)
        ]

    def _find(self, picture: Tensor, names: list[str], threshold: float) -> dict[str, list[Found]]:
        device = next(self.model.parameters()).device
        pixels = self.read(images=[to_image(picture)], return_tensors="pt")["pixel_values"]
        texts = [self.template.replace("{}", name) for name in names]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        made = self.model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=pixels.to(device),
        )
        # Pictures are padded to squares at the right and below, so boxes are parts of the longer
        # side. Each box belongs to the name that fits it best.
        scores, numbers = made.logits[0].sigmoid().max(dim=-1)
        side = max(picture.shape[-2:])
        centres, sizes = (made.pred_boxes[0] * side).split(2, dim=-1)
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)
        found: dict[str, list[Found]] = {name: [] for name in names}
        for i in scores.argsort(descending=True).tolist()[:_MOST]:
            if scores[i] > threshold:
                left, top, right, bottom = boxes[i].tolist()
                found[names[int(numbers[i])]].append(
                    Found(float(scores[i]), (left, top, right, bottom))
                )
        return found


def _instances(
    classes: Tensor,
    masks: Tensor,
    size: tuple[int, ...],
    numbers: dict[str, int],
    threshold: float,
) -> dict[str, list[Found]]:
    """Return the instances of one picture by name.

    Args:
        classes: Logits of every query's classes, the last one for none, [Q, C + 1].
        masks: Logits of every query's mask, [Q, h, w].
        size: Of the picture.
        numbers: Wanted classes by name.
        threshold: Least score.
    """
    probabilities = classes.softmax(dim=-1)[:, :-1]
    count = min(_MOST, probabilities.numel())
    best, places = probabilities.flatten().topk(count)
    queries, labels = places // probabilities.shape[1], places % probabilities.shape[1]
    names = {number: name for name, number in numbers.items()}
    found: dict[str, list[Found]] = {name: [] for name in numbers}
    for probability, query, label in zip(best, queries, labels, strict=True):
        name = names.get(int(label))
        if name is None or probability <= threshold:
            continue
        logits = F.interpolate(masks[query][None, None], size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        score = float(probability * logits[mask].sigmoid().mean())
        if score > threshold:
            found[name].append(Found(score, _box(mask), mask.cpu()))
    for own in found.values():
        own.sort(key=lambda one: -one.score)
    return found


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = (mask.any(dim=d).nonzero().flatten().tolist() for d in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
