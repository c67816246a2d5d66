"""T2I-CompBench++: attribute binding, places, numbers, actions and all of them together."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.benchmarks.boxes import Found, kept
from domains.text_to_image.benchmarks.group_means import GroupMeans
from domains.text_to_image.benchmarks.phrases import noun_phrases
from domains.text_to_image.benchmarks.placing import (
    Objects,
    alone,
    number_score,
    place_score,
    placed_of,
    wanted_numbers,
)
from domains.text_to_image.benchmarks.prompts import CATEGORIES
from domains.text_to_image.networks.blip_vqa import BlipVQA
from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.networks.open_vocabulary import DepthEstimator, OpenVocabulary
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import BadArgument, UsageError, at_least, within
from lit_rlft.core.pipeline import Condition

__all__ = ["T2ICompBench"]

_MOST_PHRASES = 8
_MAX_OVERLAP = 0.5
_Score = Callable[[Tensor, Sequence[str]], Tensor]
_ATTRIBUTES = {"color", "shape", "texture", "complex"}
_DETECTED = {"spatial", "3d_spatial", "numeracy", "complex"}
_ACTIONS = {"non_spatial", "complex"}
_DEEP = {"3d_spatial"}


class T2ICompBench(GroupMeans):
    """T2I-CompBench++'s score per category, in [0, 1], and the mean of the categories.

    - color, shape, texture: BLIP-VQA, the product over the prompt's noun phrases of
      P(yes) / (P(yes) + P(no)) for the question "<phrase>?", at most eight.
    - spatial: a quarter of the score of each of the two things, and half of how right their place
      is; 0 below one half. 3d_spatial: the same with a map of depth, and no such limit.
    - numeracy: of each thing half for being there, half for its number.
    - non_spatial: CLIPScore, the cosine of picture and prompt.
    - complex: the mean of BLIP-VQA, place and CLIPScore (3-in-1); where the data know that a
      prompt has no action, of the first two, and without a place, of the first and third.

    How far from the original's numbers. Near: color, shape, texture (BLIP at 384 pixels instead of
    480; noun phrases by our own rules instead of spaCy's) and non_spatial. Not comparable: spatial,
    3d_spatial and numeracy, by an open-vocabulary detector instead of UniDet, whose scores have
    another scale; complex, which holds these, takes CLIPScore of the whole prompt (the original
    leaves adjectives out), and knows "on top of", which the original's rules of place score 0.
    The original has no mean over categories.

    Args:
        categories: Those that are scored; samples of others do not count. Models that none of them
            needs are not loaded.
        blip: Folder or hub id of a BLIP that answers questions.
        clip: Folder or hub id of a CLIP.
        detector: Folder or hub id of an OWL-ViT or OWLv2.
        depth: Folder or hub id of a model that estimates depth.
        detector_threshold: Least score of a found thing.
        batch_size: Questions asked at a time.
        dtype: Precision of the weights of BLIP, detector and depth.

    Raises:
        UsageError: A category is unknown, or a model is none of its kind.

    References:
        T2I-CompBench++ (Huang et al., 2025), https://arxiv.org/abs/2307.06350
    """

    def __init__(
        self,
        categories: Sequence[str] = CATEGORIES,
        *,
        blip: str = "Salesforce/blip-vqa-capfilt-large",
        clip: str = "openai/clip-vit-base-patch32",
        detector: str = "google/owlv2-base-patch16-ensemble",
        depth: str = "Intel/dpt-hybrid-midas",
        detector_threshold: float = 0.2,
        batch_size: int = 16,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        within(0, 1, self, detector_threshold=detector_threshold)
        kind = precision(self, dtype)
        own = set(categories)
        if not own or own - set(CATEGORIES):
            problem = f"must be some of {list(CATEGORIES)}, got {list(categories)}"
            raise BadArgument(self, "categories", problem)
        self.categories, self.batch_size = own, batch_size
        self.detector_threshold = detector_threshold
        if own & _ATTRIBUTES:
            give = "the folder or hub id of one, such as Salesforce/blip-vqa-capfilt-large"
            with reading("blip", blip, "a BLIP that answers questions", give):
                self.blip = BlipVQA(blip, kind)
        if own & _ACTIONS:
            self.encoder = CLIPEncoder(clip)
        if own & _DETECTED:
            give = "the folder or hub id of one, such as google/owlv2-base-patch16-ensemble"
            with reading("detector", detector, "an OWLv2", give):
                self.detector = OpenVocabulary(detector, kind)
        if own & _DEEP:
            give = "the folder or hub id of one, such as Intel/dpt-hybrid-midas"
            with reading("depth", depth, "a model that estimates depth", give):
                self.depth = DepthEstimator(depth, kind)

    def groups(self, condition: Condition) -> list[str]:
        """Return the category of each sample, "" for those that are not scored."""
        found = [_category(entry) for entry in condition.each()]
        return [one if one in self.categories else "" for one in found]

    def scores(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B], in [0, 1]."""
        pictures, groups = check_pictures(samples, condition), self.groups(condition)
        records = condition.each()
        texts = [str(record["prompt"]) for record in records]

        def rows(wanted: set[str]) -> list[int]:
            return [i for i, group in enumerate(groups) if group in wanted]

        bound = self._each(rows(_ATTRIBUTES), pictures, texts, self.attributes)
        acted = self._each(rows(_ACTIONS), pictures, texts, self.actions)
        scores = torch.full((len(texts),), math.nan, dtype=torch.float64)
        for i, group in enumerate(groups):
            if group == "complex":
                placed = self.place(pictures[i], texts[i], by_head=True)
                parts = {"attribute": bound[i], "spatial": placed, "action": acted[i]}
                scores[i] = _three_in_one(parts, records[i].get("relation"))
            elif group in _DETECTED:
                scores[i] = self._detected(pictures[i], texts[i], group)
            elif group:
                scores[i] = bound.get(i, acted.get(i, math.nan))
        return scores

    def attributes(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return BLIP-VQA's score of each picture, [B]."""
        phrases = [noun_phrases(prompt)[:_MOST_PHRASES] for prompt in prompts]
        owners = [i for i, own in enumerate(phrases) for _ in own]
        asked = [f"{phrase}?" for own in phrases for phrase in own]
        scores = torch.ones(len(prompts), dtype=torch.float64)
        for start in range(0, len(asked), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers = self.blip(pictures[owners[part]], asked[part]).cpu()
            for owner, answer in zip(owners[part], answers, strict=True):
                scores[owner] *= answer
        return scores

    def actions(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each picture and its prompt, [B]."""
        images = self.encoder.embed_pictures(pictures)
        return (images * self.encoder.embed_texts(prompts)).sum(dim=-1).double().cpu()

    def place(self, picture: Tensor, prompt: str, *, by_head: bool = False) -> float:
        """Return how well two things of a prompt lie in a picture, 0 where it names no place."""
        placed = placed_of(prompt, by_head=by_head)
        deep = placed is not None and placed[1] in ("front", "behind")
        if placed is None or (deep and by_head):
            return 0.0
        objects = self.found(picture, {placed[0], placed[2]})
        depth = self.depth(picture) if deep else None
        return place_score(placed, objects, _size(picture), depth)

    def found(self, picture: Tensor, names: set[str]) -> Objects:
        """Return the named things in a picture [3, H, W], the surest first."""
        ordered = sorted(names)
        rows = self.detector(picture, ordered, self.detector_threshold)
        objects = {
            name: [Found(score, (box[0], box[1], box[2], box[3])) for score, *box in own.tolist()]
            for name, own in zip(ordered, rows, strict=True)
        }
        # OWL-ViT finds a thing many times; detectors such as UniDet do this by themselves.
        return {name: kept(own, 0, len(own), _MAX_OVERLAP) for name, own in objects.items()}

    def _detected(self, picture: Tensor, prompt: str, category: str) -> float:
        if category != "numeracy":
            return self.place(picture, prompt)
        wanted = wanted_numbers(prompt)
        if not wanted:
            return math.nan
        objects = self.found(picture, {name for _, name in wanted})
        return number_score(wanted, {name: alone(own) for name, own in objects.items()})

    def _each(
        self, rows: list[int], pictures: Tensor, texts: list[str], score: _Score
    ) -> dict[int, float]:
        """Return what a score gives for some rows, by row."""
        if not rows:
            return {}
        values = score(pictures[rows], [texts[i] for i in rows])
        return dict(zip(rows, values.tolist(), strict=True))


def _three_in_one(parts: Mapping[str, float], relation: str | None) -> float:
    """Return the mean of the parts that a complex prompt has.

    Args:
        parts: Scores under "attribute", "spatial" and "action".
        relation: "spatial" or "action" for prompts that have that alone; None for both.
    """
    own = [parts["attribute"]]
    own += [parts[name] for name in ("spatial", "action") if relation in (None, name)]
    return sum(own) / len(own)


def _size(picture: Tensor) -> tuple[int, int]:
    return picture.shape[-2], picture.shape[-1]


def _category(entry: Mapping[str, Any]) -> str:
    if entry.get("category") not in CATEGORIES:
        raise UsageError(
            "T2ICompBench needs the 'category' of each prompt, but the data have "
            f"{sorted(entry)} with {entry.get('category')!r}; set data to T2ICompBenchPrompts"
        )
    return str(entry["category"])
