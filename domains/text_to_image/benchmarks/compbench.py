"""T2I-CompBench++: attributes, places, numbers and actions of a prompt, by category.

References:
    T2I-CompBench++ (Huang et al., 2023 to 2025), https://arxiv.org/abs/2307.06350; rules as in the
    authors' program, https://github.com/Karine-Huang/T2I-CompBench
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.benchmarks.detectors import Detector, Found, OWLv2
from domains.text_to_image.phrases import counted_things, placed_things
from domains.text_to_image.rewards.blip_vqa import BLIPVQA
from domains.text_to_image.rewards.clip import CLIPScore
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import UsageError, within
from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric, Reward

__all__ = ["CATEGORIES", "T2ICompBench", "place_score"]

_ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*_ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
_PERSONS = {"girl", "boy", "man", "woman"}
_ALIKE = 0.9  # of an overlap, from which two boxes are one thing
_FEW_OVERLAP, _NEAR = 0.1, 150.0


class T2ICompBench(Metric):
    """Scores of T2I-CompBench++ by category, "t2i_compbench/<category>", in [0, 1].

    | category | score |
    |---|---|
    | color, shape, texture | `BLIPVQA` |
    | spatial | a quarter of both detector's scores, half of `place_score`; 0 below 0.5 |
    | numeracy | for each kind half if it is found, and half if as many are found as asked for |
    | non_spatial | cosine of CLIP ViT-B/32 |
    | complex | mean of BLIP-VQA and spatial where the prompt has a place, else with CLIP |
    | 3d_spatial | none: it takes a depth estimate; use `VQAScore` |

    Aggregated as published: the mean over pictures of a category; draw ten per prompt
    (`--model.num_eval_samples 10`). The published detector is UniDet, the phrases are spaCy's, and
    lists by hand say which complex prompts have places and actions: compare numbers with others
    made here alone.

    The data are the benchmark's text files with their category:
    `--data.test_source "prompts/*_val.txt"`.

    Args:
        attributes: Scores attributes; BLIPVQA unless given.
        detector: Finds objects by name; OWLv2 unless given.
        clip: CLIP of actions: a folder or hub id.
        threshold: Detector's score from which an object counts.

    Raises:
        UsageError: Weights are missing; or a record has no `category` of the benchmark's.
    """

    def __init__(
        self,
        attributes: Reward | None = None,
        detector: Detector | None = None,
        clip: str = "openai/clip-vit-base-patch32",
        threshold: float = 0.3,
    ) -> None:
        super().__init__()
        within(0, 1, self, threshold=threshold)
        self.attributes = attributes or BLIPVQA()
        self.detector, self.actions = detector or OWLv2(), CLIPScore(clip)
        self.threshold = threshold

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the score of each category, [B] each, NaN for pictures of another one."""
        pictures, records = check_pictures(samples, condition), condition.each()
        categories = [_category(record) for record in records]
        kinds: dict[str, Callable[[Tensor, Condition], Tensor]] = {
            **dict.fromkeys(_ATTRIBUTES, self.attributes),
            "spatial": self._places,
            "numeracy": self._numbers,
            "non_spatial": self.actions,
            "complex": self._complex,
        }
        values = {}
        for category, score in kinds.items():
            rows = torch.tensor([i for i, own in enumerate(categories) if own == category])
            if len(rows):
                known = score(pictures[rows], condition.index(rows)).double().cpu()
                own = torch.full((len(records),), torch.nan, dtype=torch.float64)
                own[rows] = known
                values[f"t2i_compbench/{category}"] = own
        return values

    def guards(self) -> dict[str, Guard]:
        """Return all categories: a fall is a sign."""
        return {f"t2i_compbench/{category}": Guard() for category in CATEGORIES}

    def _places(self, pictures: Tensor, condition: Condition) -> Tensor:
        placed = [placed_things(record["prompt"]) for record in condition.each()]
        names = [[_object(p.first), _object(p.second)] if p else [] for p in placed]
        found = self.detector.find(pictures, [list(dict.fromkeys(own)) for own in names], 0.0)
        scores = []
        for one, own, seen in zip(placed, names, found, strict=True):
            best = [next(iter(self._sure(seen.get(name, ()))), None) for name in own]
            scores.append(_spatial(best, one.place) if one is not None else 0.0)
        return torch.tensor(scores)

    def _numbers(self, pictures: Tensor, condition: Condition) -> Tensor:
        wanted = [counted_things(record["prompt"]) for record in condition.each()]
        names = [list(dict.fromkeys(_object(one.name) for one in own)) for own in wanted]
        found = self.detector.find(pictures, names, self.threshold)
        scores = []
        for own, seen in zip(wanted, found, strict=True):
            different = {name: len(_different(seen.get(name, ()))) for name in seen}
            parts = [
                0.5 * (different.get(_object(one.name), 0) > 0)
                + 0.5 * (different.get(_object(one.name), 0) == one.number)
                for one in own
            ]
            scores.append(sum(parts) / len(parts) if parts else 0.0)
        return torch.tensor(scores)

    def _complex(self, pictures: Tensor, condition: Condition) -> Tensor:
        attributes = self.attributes(pictures, condition).double().cpu()
        places = self._places(pictures, condition).double()
        actions = self.actions(pictures, condition).double().cpu()
        has_place = [placed_things(r["prompt"]) is not None for r in condition.each()]
        return (attributes + places.where(torch.tensor(has_place), actions)) / 2

    def _sure(self, found: Sequence[Found]) -> list[Found]:
        return [one for one in found if one.score > self.threshold]


def place_score(place: str, first: Sequence[float], second: Sequence[float]) -> float:
    """Return how well a place fits two boxes, in [0, 1].

    Next to each other are boxes whose centres are within 150 pixels in either direction; farther
    ones have 150 pixels over the larger distance. In the other places, which ask for a direction,
    boxes that overlap by more than 0.1 have 0.1 over their overlap.

    Args:
        place: One of `PLACES`.
        first: Left, top, right and bottom of the first thing.
        second: Of the second one.
    """
    x, y = (sum(second[i::2]) / 2 - sum(first[i::2]) / 2 for i in (0, 1))
    if place in ("next to", "on side of", "on the side of", "near"):
        near = abs(x) < _NEAR or abs(y) < _NEAR
        return 1.0 if near else _NEAR / max(abs(x), abs(y))
    along, across, sign = {
        "on the right of": (x, y, -1),
        "on the left of": (x, y, 1),
        "on the bottom of": (y, x, -1),
        "on the top of": (y, x, 1),
        "on top of": (y, x, 1),
    }[place]
    if along * sign <= 0 or abs(along) <= abs(across):
        return 0.0
    overlap = _overlap(first, second) / (_area(first) + _area(second) - _overlap(first, second))
    return 1.0 if overlap < _FEW_OVERLAP else _FEW_OVERLAP / overlap


def _spatial(found: Sequence[Found | None], place: str) -> float:
    known = [one for one in found if one is not None]
    score = 0.25 * sum(one.score for one in known)
    if len(known) == 2:
        score += 0.5 * place_score(place, known[0].box, known[1].box)
    return score if score >= 0.5 else 0.0


def _different(found: Sequence[Found]) -> list[Found]:
    """Return those that are no second box of an object found before."""
    kept: list[Found] = []
    for one in found:
        if not any(_same(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    common = _overlap(a, b)
    shares = (common / (_area(a) + _area(b) - common), common / _area(a), common / _area(b))
    return max(shares) > _ALIKE


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    sides = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    width, height = (max(side, 0.0) for side in sides)
    return width * height


def _area(box: Sequence[float]) -> float:
    return max((box[2] - box[0]) * (box[3] - box[1]), 1e-9)


def _object(name: str) -> str:
    return "person" if name in _PERSONS else name


def _category(record: Mapping[str, Any]) -> str:
    category = record.get("category")
    if category not in CATEGORIES:
        raise UsageError(
            f"T2ICompBench: the prompt {record.get('prompt')!r} has category {category!r} instead "
            f"of {', '.join(CATEGORIES)}; give the benchmark's files by a pattern whose * is the "
            'category: --data.test_source "prompts/*_val.txt"'
        )
    return str(category)
