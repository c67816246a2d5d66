"""GenEval's rules, and the metric that applies them with models of transformers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.benchmarks.boxes import Found, apart, kept
from domains.text_to_image.benchmarks.group_means import GroupMeans
from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.networks.mask2former import Mask2Former
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import BadArgument, UsageError, at_least, within
from lit_rlft.core.pipeline import Condition

__all__ = ["COLORS", "RELATIONS", "TASKS", "GenEvalHF", "judged"]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")
_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_GREY = 0x99 / 255
"""What is shown in place of everything that is not the object."""

Colors = Callable[[Sequence[Found], str], Sequence[str]]
"""Returns the colour of each of some objects of one class."""


class GenEvalHF(GroupMeans):
    """GenEval-HF: whether a detector finds in a picture what its prompt asks for.

    A picture is right or wrong; a task's score is the share of its pictures that are right, and
    the whole is the mean of the six tasks' scores: GenEval's protocol, thresholds and summary, on
    models of transformers. An object counts above `threshold`, in counting tasks above
    `counting_threshold`; of each class the surest ones are looked at. Its colour is the one that
    CLIP finds likeliest for its pixels on grey (#999); its place is its box's.

    How far from GenEval's own numbers: the default detector has the same architecture (Mask2Former
    with Swin-S, COCO instances), but these are the authors' weights, not mmdet's, and pictures are
    resized by transformers. Compare its numbers among themselves. GenEval's own: SD 1.5 0.43,
    SD 2.1 0.50, SDXL 0.55.

    Args:
        detector: Folder or hub id of a Mask2Former for COCO's instances.
        clip: Folder or hub id of the CLIP that tells colours.
        threshold: Least score of an object.
        counting_threshold: Least score of an object in counting tasks.
        max_objects: Objects of one class that count at most.
        max_overlap: Of two objects of a class whose boxes overlap as much, the surer one counts;
            1 keeps both.
        position_threshold: Share of both sizes by which objects must be apart.
        dtype: Precision of the detector's weights.

    Raises:
        UsageError: A model is none of its kind, or a threshold is out of its range.

    References:
        GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment
        (Ghosh, Hajishirzi, Schmidt, 2023), https://arxiv.org/abs/2310.11513
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        *,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_threshold: float = 0.1,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        within(0, 1, self, threshold=threshold, counting_threshold=counting_threshold)
        within(0, 1, self, max_overlap=max_overlap, position_threshold=position_threshold)
        at_least(1, self, max_objects=max_objects)
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects, self.max_overlap = max_objects, max_overlap
        self.position_threshold = position_threshold
        kind = precision(self, dtype)
        give = "the folder or hub id of one, such as facebook/mask2former-swin-small-coco-instance"
        with reading("detector", detector, "a Mask2Former", give):
            self.detector = Mask2Former(detector, kind)
        if not {"person", "dining table", "tv"} <= {*self.detector.classes}:
            some = ", ".join(self.detector.classes[:3])
            problem = f"must know COCO's classes, but {detector} knows {some}, ...; give {give}"
            raise BadArgument(self, "detector", problem)
        self.encoder = CLIPEncoder(clip)

    def groups(self, condition: Condition) -> list[str]:
        """Return the task of each sample."""
        return [_record(entry)["tag"] for entry in condition.each()]

    def scores(self, samples: Any, condition: Condition) -> Tensor:
        """Return 1 for right pictures and 0 for wrong ones, [B]."""
        pictures = (check_pictures(samples, condition).clamp(0, 1) * 255).round() / 255
        records = [_record(entry) for entry in condition.each()]
        right = [self._right(x, record) for x, record in zip(pictures, records, strict=True)]
        return torch.tensor(right, dtype=torch.float64)

    def _right(self, picture: Tensor, record: Mapping[str, Any]) -> bool:
        counting = record["tag"] == "counting"
        least = self.counting_threshold if counting else self.threshold
        wanted = {clause["class"] for key in _CLAUSES for clause in record.get(key) or ()}
        self._check_classes(wanted)
        objects = {
            name: kept(own, least, self.max_objects, self.max_overlap)
            for name, own in self.found(picture, wanted).items()
        }

        def colors(objects: Sequence[Found], name: str) -> list[str]:
            return [self.color(picture, one, name) for one in objects]

        return judged(record, objects, colors, self.position_threshold)

    def found(self, picture: Tensor, wanted: set[str]) -> dict[str, list[Found]]:
        """Return the objects of the wanted classes in a picture [3, H, W], the surest first."""
        scores, classes, masks = self.detector(picture)
        objects: dict[str, list[Found]] = {name: [] for name in wanted}
        for score, number, mask in zip(scores.tolist(), classes.tolist(), masks, strict=True):
            name = self.detector.classes[number]
            if name in wanted:
                rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                left, top, right, bottom = (float(edge) for edge in box)
                objects[name].append(Found(score, (left, top, right, bottom), mask))
        return objects

    def color(self, picture: Tensor, one: Found, name: str) -> str:
        """Return the likeliest colour of an object of a picture [3, H, W]."""
        shown = picture
        if one.mask is not None:
            shown = picture.where(one.mask.to(picture.device), picture.new_tensor(_GREY))
        left, top, right, bottom = (round(edge) for edge in one.box)
        image = self.encoder.embed_pictures(shown[None, :, top:bottom, left:right])[0]
        texts = [template.format(color, name) for color in COLORS for template in _TEMPLATES]
        embedded = self.encoder.embed_texts(texts).view(len(COLORS), len(_TEMPLATES), -1)
        return COLORS[int((F.normalize(embedded.mean(dim=1), dim=-1) @ image).argmax())]

    def _check_classes(self, wanted: set[str]) -> None:
        if unknown := sorted(wanted - {*self.detector.classes}):
            raise UsageError(
                f"GenEvalHF: the detector does not know {unknown[0]!r}, which a prompt asks for; "
                "give a detector of COCO's classes, or prompts of these alone"
            )


_CLAUSES = ("include", "exclude")


def judged(
    record: Mapping[str, Any],
    objects: Mapping[str, Sequence[Found]],
    colors: Colors,
    position_threshold: float = 0.1,
) -> bool:
    """Return whether a picture shows what its record asks for.

    Of each clause under "include" the `count` surest objects of the class must be there, all of
    the clause's colour, and all at its position from all objects of the clause that it names. Of
    no clause under "exclude" may there be `count` objects or more.

    Args:
        record: With "include" and, where there is one, "exclude".
        objects: Those found, by class, the surest first.
        colors: Returns the objects' colours.
        position_threshold: As in `apart`.
    """
    matched: list[Sequence[Found] | None] = []
    for clause in record.get("include") or ():
        own = objects.get(clause["class"], ())[: clause["count"]]
        right = len(own) == clause["count"]
        if right and clause.get("color") is not None:
            right = all(color == clause["color"] for color in colors(own, clause["class"]))
        if right and clause.get("position") is not None:
            relation, target = clause["position"]
            others = matched[target]
            right = others is not None and all(
                relation in apart(one.box, other.box, position_threshold)
                for one in own
                for other in others
            )
        matched.append(own if right else None)
    too_many = any(
        len(objects.get(clause["class"], ())) >= clause["count"]
        for clause in record.get("exclude") or ()
    )
    return None not in matched and not too_many


def _record(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    if entry.get("tag") is None or not entry.get("include"):
        raise UsageError(
            "GenEvalHF needs 'tag' and 'include' for each prompt, but the data only have "
            f"{sorted(entry)}; set data to GenEvalPrompts"
        )
    return entry
