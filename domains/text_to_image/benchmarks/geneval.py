r"""GenEval: whether a picture shows the objects that its prompt names, by a detector.

References:
    GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment (Ghosh et al.,
    2023), https://arxiv.org/abs/2310.11513; rules as in the authors' program,
    https://github.com/djghosh13/geneval
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.benchmarks.detectors import Detector, Found, Mask2Former
from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import SetMetric

__all__ = ["COLOURS", "TASKS", "GenEval", "is_correct", "relations"]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
)
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}")
_ANY = "a photo of a {colour} object"
_GREY = 0x99 / 255
_COCO = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}
"""COCO's names by GenEval's, where they differ."""
_THRESHOLD, _COUNTING_THRESHOLD, _MOST, _MARGIN = 0.3, 0.9, 16, 0.1


class GenEval(SetMetric):
    """Shares of pictures that are right, by task and over all: "geneval_hf", in [0, 1].

    "geneval_hf/<task>" for each of the six tasks, and "geneval_hf", the mean of the tasks' shares.
    A picture is right where the detector finds what the record asks for: at least so many objects
    of each class (`include`), fewer than so many (`exclude`), in the colour and at the place asked.
    Published settings: scores above 0.3, for counting 0.9; 16 objects of a class at most; colours
    by CLIP on the object's crop, its surroundings grey.

    Not the official numbers, hence the name: these come from mmdetection's Mask2Former with Swin-S,
    this is the same network as trained by its own authors. Published by the official program:
    Stable Diffusion 1.5 0.43, 2.1 0.50, XL 0.55. Draw four samples per prompt
    (`--model.num_eval_samples 4`) as published.

    The data are GenEval's evaluation_metadata.jsonl, or records like it: `prompt`, `tag`, `include`
    and, for counting, `exclude`.

    Args:
        detector: Finds the objects; Mask2Former unless given.
        clip: CLIP that tells colours: a folder or hub id.
        batch_size: Pictures looked at at a time, which bounds the memory.

    Raises:
        UsageError: Weights are missing; or a record has no `tag` and `include` as above.
    """

    def __init__(
        self,
        detector: Detector | None = None,
        clip: str = "openai/clip-vit-large-patch14",
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        self.detector = detector or Mask2Former()
        self.encoder, self.batch_size = CLIPEncoder(clip), batch_size

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return each picture's task, int64 [B], and whether it is right, float64 [B]."""
        pictures, records = check_pictures(samples, condition), condition.each()
        tasks = [_task(record) for record in records]
        right = []
        for start in range(0, len(records), self.batch_size):
            part = slice(start, start + self.batch_size)
            right += self._right(pictures[part], records[part])
        return {"task": torch.tensor(tasks), "right": torch.tensor(right, dtype=torch.float64)}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the shares of the tasks that occur, and their mean."""
        shares = {
            f"geneval_hf/{task}": float(right.mean()) for task, right in _by_task(features).items()
        }
        return {"geneval_hf": sum(shares.values()) / len(shares), **shares}

    def errors(
        self, features: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Return the standard errors: of a mean over a task's pictures, and of the tasks' mean."""
        if other is not None:
            features = {**features, "right": features["right"] - other["right"]}
        errors = {}
        for task, right in _by_task(features).items():
            known = len(right) > 1
            errors[f"geneval_hf/{task}"] = (
                float(right.std()) / len(right) ** 0.5 if known else float("nan")
            )
        total = sum(error**2 for error in errors.values()) ** 0.5 / len(errors)
        return {"geneval_hf": total, **errors}

    def guards(self) -> dict[str, Guard]:
        """Return {"geneval_hf"}: a fall is a sign."""
        return {"geneval_hf": Guard()}

    def _right(self, pictures: Tensor, records: Sequence[Mapping[str, Any]]) -> list[bool]:
        names = [_names(record) for record in records]
        wanted = [[_COCO.get(name, name) for name in own] for own in names]
        try:
            found = self.detector.find(pictures, wanted, _THRESHOLD)
        except ValueError as error:
            raise UsageError(f"GenEval: {error}") from error
        right = []
        for picture, record, own, seen in zip(pictures, records, names, found, strict=True):
            least = _COUNTING_THRESHOLD if record["tag"] == "counting" else _THRESHOLD
            objects = {
                name: [one for one in seen[_COCO.get(name, name)] if one.score > least][:_MOST]
                for name in own
            }

            def colours(name: str, some: Sequence[Found], picture: Tensor = picture) -> list[str]:
                return [self.colour(picture, one, name) for one in some]

            right.append(is_correct(record, objects, colours))
        return right

    def colour(self, picture: Tensor, one: Found, name: str) -> str:
        """Return the name of an object's colour."""
        texts = [
            template.format(colour=colour, name=name)
            for colour in COLOURS
            for template in (*_TEMPLATES, _ANY)
        ]
        embedded = self.encoder.embed_texts(texts).view(len(COLOURS), len(_TEMPLATES) + 1, -1)
        classes = torch.nn.functional.normalize(embedded.mean(dim=1), dim=-1)
        crop = self.encoder.embed_pictures(_crop(picture, one).unsqueeze(0))
        return COLOURS[int((crop.to(classes) @ classes.T).argmax())]


def is_correct(
    record: Mapping[str, Any],
    objects: Mapping[str, Sequence[Found]],
    colours: Any,
) -> bool:
    """Return whether a picture shows what a record asks for.

    Args:
        record: Has `include` and perhaps `exclude`.
        objects: What was found, by name, the surest first.
        colours: Function of a name and some of its objects; returns their colours' names.
    """
    right = True
    groups: list[list[Found] | None] = []
    for wish in record["include"]:
        name, count = wish["class"], wish["count"]
        own = list(objects.get(name, ()))[:count]
        matched = len(own) == count
        if matched and wish.get("color"):
            matched = list(colours(name, own)).count(wish["color"]) >= count
        if matched and wish.get("position"):
            relation, place = wish["position"]
            targets = groups[place]
            matched = targets is not None and all(
                relation in relations(one.box, other.box) for one in own for other in targets
            )
        groups.append(own if matched else None)
        right = right and matched
    unwanted = record.get("exclude") or ()
    return right and all(len(objects.get(w["class"], ())) < w["count"] for w in unwanted)


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Return where box a lies from box b: "left of", "right of", "above", "below"; or nothing.

    The distance of the centres counts beyond a tenth of the summed sizes, and a direction that is
    more than half of the whole distance.
    """
    ends_a, ends_b = (torch.tensor(box, dtype=torch.float64).view(2, 2) for box in (a, b))
    offset = ends_a.mean(dim=0) - ends_b.mean(dim=0)
    sizes = (ends_a[1] - ends_a[0]).abs() + (ends_b[1] - ends_b[0]).abs()
    beyond = (offset.abs() - _MARGIN * sizes).clamp(min=0) * offset.sign()
    if (beyond.abs() < 1e-3).all():
        return set()
    x, y = (beyond / offset.norm()).tolist()
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}


def _crop(picture: Tensor, one: Found) -> Tensor:
    """Return the object alone before grey, cut out, [3, h, w]."""
    if one.mask is not None:
        picture = picture.where(one.mask.to(picture.device), _GREY)
    left, top, right, bottom = (round(edge) for edge in one.box)
    height, width = picture.shape[-2:]
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _by_task(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tasks, right = features["task"], features["right"]
    return {TASKS[i]: right[tasks == i] for i in range(len(TASKS)) if (tasks == i).any()}


def _task(record: Mapping[str, Any]) -> int:
    tag, include = record.get("tag"), record.get("include")
    if tag not in TASKS or not isinstance(include, list):
        raise UsageError(
            f"GenEval: the prompt {record.get('prompt')!r} has tag {tag!r} and include "
            f"{include!r}; use the records of GenEval's evaluation_metadata.jsonl, with a tag of "
            f"{', '.join(TASKS)}"
        )
    return TASKS.index(tag)


def _names(record: Mapping[str, Any]) -> list[str]:
    wishes = [*record["include"], *(record.get("exclude") or ())]
    return list(dict.fromkeys(wish["class"] for wish in wishes))
