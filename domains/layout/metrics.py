"""Measurements of layouts that no reward sees: of each, and of whole sets.

References:
    Demystifying MMD GANs (Binkowski et al., 2018; KID), https://arxiv.org/abs/1801.01401
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domains.layout.networks.encoder import LayoutEncoder, load_encoder
from domains.layout.page import measures
from domains.layout.page.classes import check_names, number_of
from domains.layout.page.comparisons import (
    box_wasserstein,
    class_total_variation,
    docsim,
    max_iou,
)
from domains.layout.samples import Layouts, check_layouts
from domains.layout.sources import Grammar, Source
from lit_rlft.core.checks import BadArgument, at_least, reading
from lit_rlft.core.guard import LARGE_FALL, LARGE_RISE, Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import LeftOut, Metric
from lit_rlft.kit.set_metrics import RealFeatures, SourceDistances, pseudo_values
from lit_rlft.kit.sources import prepare
from lit_rlft.kit.statistics import frechet_distance

__all__ = [
    "Diversity",
    "LayoutMeasures",
    "MaxIoU",
    "SetDistances",
    "box_wasserstein",
    "class_total_variation",
    "docsim",
    "frechet_distance",
    "max_iou",
    "source_layouts",
]

_IGNORED = "metrics: ignored of LayoutMeasures"


class LayoutMeasures(Metric):
    """Alignment times 100, overlap, number of elements and covered share of each layout.

    Args:
        compat: Compute alignment with the mistake of the code that most papers use.
        ignored: Names of classes that overlap leaves out, such as RICO's "Background Image".
    """

    def __init__(self, compat: bool = False, ignored: Sequence[str] = ()) -> None:
        super().__init__()
        self.compat, self.ignored = compat, tuple(ignored)

    def check(self, pipeline: Pipeline) -> None:
        check_names(self.ignored, pipeline, _IGNORED)

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"alignment_100", "overlap", "num_elements", "coverage"}, [B] each.

        Raises:
            UsageError: A class to be ignored is none of the layouts'.
        """
        layouts = check_layouts(samples, condition)
        labels = [number_of(name, layouts.classes, _IGNORED) for name in self.ignored]
        ignored = torch.tensor(labels, device=layouts.labels.device) if labels else None
        return {
            "alignment_100": 100 * measures.alignment(layouts, compat=self.compat),
            "overlap": measures.overlap(layouts, ignored=ignored),
            "num_elements": measures.num_elements(layouts),
            "coverage": measures.coverage(layouts),
        }


class SetDistances(SourceDistances["_Real"]):
    """FID, KID, class and box distances of an evaluation's samples from a set of layouts.

    "class_tv", "box_wasserstein", "fid" and "kid". FID depends on the number of samples and on the
    encoder: compare runs that share both. Boxes that are not finite are left out, of FID and KID
    their whole layouts. Standard errors are those of drawing other samples; the layouts compared
    with are taken as they are.

    Args:
        source: The layouts compared with; pages of the page grammar unless given.
        pretrained: The encoder: "encoder", the embedded one, a folder, or the file of a published
            network for the source's classes.
        max_layouts: Compare with the first so many layouts.
        num_draws: Groups of layouts left out in turn for the standard errors of a test of class and
            box distances; 0 leaves all errors out.
    """

    def __init__(
        self,
        source: Source | None = None,
        pretrained: str = "encoder",
        max_layouts: int = 2048,
        num_draws: int = 20,
    ) -> None:
        super().__init__(num_draws)
        at_least(2, self, max_layouts=max_layouts)
        self.source = source or Grammar(num_pages=max_layouts, seed=1)
        with reading(self, "pretrained"):
            self.encoder = load_encoder(pretrained, self.source.classes)
        self.max_layouts = max_layouts

    def check(self, pipeline: Pipeline) -> None:
        own = {"pretrained": self.encoder.classes, "source": self.source.classes}
        _check_classes(self, own, pipeline)
        prepare(self, "source", self.source)

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return boxes [B, N, 4], labels [B, N] and the encoder's features [B, D]."""
        layouts = check_layouts(samples, condition).detach().to("cpu")
        encoded = _features(self.encoder, layouts)
        return {"boxes": layouts.boxes, "labels": layouts.labels, "features": encoded}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the four distances."""
        encoded = features["features"]
        encoded = encoded[encoded.isfinite().all(dim=1)]
        return self.compare_draw(features) | {
            "fid": self.real.known.frechet_distance(encoded),
            "kid": self.real.known.kernel_distance(encoded),
        }

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return "fid" and "kid"; NaN where a layout has a box that is not finite."""
        encoded = features["features"]
        if not encoded.isfinite().all():
            each = torch.full((len(encoded),), torch.nan, dtype=torch.float64)
            unknown = LeftOut(each, each.new_full((len(pairs),), torch.nan))
            return {"fid": unknown, "kid": unknown}
        fid, kid = self.real.known.distances_left_out(encoded, pairs)
        return {"fid": fid, "kid": kid}

    def compare_draw(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return "class_tv" and "box_wasserstein"."""
        layouts = Layouts.of(features["boxes"], features["labels"], self.source.classes)
        return {
            "class_tv": class_total_variation(layouts, self.real.layouts),
            "box_wasserstein": box_wasserstein(layouts, self.real.layouts),
        }

    def guards(self) -> dict[str, Guard]:
        """Return all four, of which a rise by a fifth is a sign."""
        return dict.fromkeys(("class_tv", "box_wasserstein", "fid", "kid"), LARGE_RISE)

    def read(self) -> "_Real":
        layouts = source_layouts(self.source, self.max_layouts)
        return _Real(layouts, RealFeatures.of(_features(self.encoder, layouts)))


@dataclass(frozen=True)
class _Real:
    """Layouts that samples are compared with, and their features."""

    layouts: Layouts
    known: RealFeatures


class MaxIoU(SourceDistances[Layouts]):
    """Max IoU of an evaluation's samples with a set of layouts, in [0, 1], higher is better.

    "max_iou": layouts of the same multiset of classes are matched, each with one other at most, so
    that the sum of their boxes' IoU is largest (`max_iou`). It depends on the number of samples
    and on that of the set: compare equally many. Papers match the test set with as many samples,
    made under its classes (`--data.tasks`).

    Args:
        source: The layouts compared with; pages of the page grammar unless given.
        max_layouts: Compare with the first so many layouts.
        num_draws: Groups of layouts left out in turn for the standard error of a test; 0 leaves it
            out.

    References:
        Constrained Graphic Layout Generation via Latent Optimization (Kikuchi et al., 2021),
        https://arxiv.org/abs/2108.00871
    """

    def __init__(
        self, source: Source | None = None, max_layouts: int = 2048, num_draws: int = 20
    ) -> None:
        super().__init__(num_draws)
        at_least(1, self, max_layouts=max_layouts)
        self.source = source or Grammar(num_pages=max_layouts, seed=1)
        self.max_layouts = max_layouts

    def check(self, pipeline: Pipeline) -> None:
        _check_classes(self, {"source": self.source.classes}, pipeline)
        prepare(self, "source", self.source)

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return boxes [B, N, 4] and labels [B, N]."""
        layouts = check_layouts(samples, condition).detach().to("cpu")
        return {"boxes": layouts.boxes, "labels": layouts.labels}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"max_iou"}; 0 where no layout has the classes of another."""
        drawn = Layouts.of(features["boxes"], features["labels"], self.source.classes)
        return {"max_iou": max_iou(drawn, self.real)}

    def guards(self) -> dict[str, Guard]:
        """Return {"max_iou"}, of which a fall by a fifth is a sign."""
        return {"max_iou": LARGE_FALL}

    def read(self) -> Layouts:
        return source_layouts(self.source, self.max_layouts)


class Diversity(Metric):
    """How much layouts of the same condition differ from each other; the mean is in [0, 1].

    1 minus the mean of DocSim(a, b) / sqrt(DocSim(a, a) DocSim(b, b)) over each layout and the next
    few of the condition; 0 when all are the same. DocSim is a mean over the larger layout's
    elements here. Layouts without elements or area are the same. One with a box that is not
    finite has NaN, and is none of the others. A fall below the reference's is the first sign that a
    reward is being exploited. A layout's own value says how much it moves the mean, so that the
    mean has the right error: it is not its difference from others, and may be negative or above 1.

    Args:
        num_others: Samples that each is compared with, at most.
    """

    def __init__(self, num_others: int = 8) -> None:
        super().__init__()
        at_least(1, self, num_others=num_others)
        self.num_others = num_others

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"diversity": [B]}, `pseudo_values`; NaN for a sample alone in its condition."""
        layouts = check_layouts(samples, condition).detach().to("cpu")
        values = torch.full((len(layouts),), torch.nan, dtype=torch.float64)
        rows = condition.rows.cpu()
        for row in rows.unique().tolist():  # type: ignore[no-untyped-call]
            members = (rows == row).nonzero().flatten()
            values[members] = self._means(layouts.index(members))
        return {"diversity": pseudo_values(values, rows)}

    def _means(self, layouts: Layouts) -> Tensor:
        """Return each layout's mean difference over the pairs that it is in, [n]."""
        num_others = min(self.num_others, len(layouts) - 1)
        if num_others < 1:
            return torch.full((len(layouts),), torch.nan, dtype=torch.float64)
        a = torch.arange(len(layouts)).repeat_interleave(num_others)
        b = (a + torch.arange(1, num_others + 1).repeat(len(layouts))) % len(layouts)
        alike = docsim(layouts.index(a), layouts.index(b), normalised=True)
        apart = 1 - torch.from_numpy(alike)
        known = ~apart.isnan()
        sums, counts = torch.zeros(2, len(layouts), dtype=torch.float64)
        for places in (a, b):
            sums.index_add_(0, places, apart.where(known, 0))
            counts.index_add_(0, places, known.double())
        return sums / counts

    def guards(self) -> dict[str, Guard]:
        """Return {"diversity"}, of which a fall by a fifth is a sign."""
        return {"diversity": LARGE_FALL}


def source_layouts(source: Source, max_layouts: int | None = None) -> Layouts:
    """Return the first layouts of a source as samples."""
    packed = source.load()
    boxes = torch.tensor(packed.boxes[:max_layouts])
    labels = torch.tensor(packed.labels[:max_layouts]).long()
    return Layouts.of(boxes, labels, source.classes)


def _check_classes(metric: Metric, own: Mapping[str, Sequence[str]], pipeline: Pipeline) -> None:
    """Raise BadArgument unless a metric's arguments have the classes that the model draws.

    Those of a model that names none are the source's.
    """
    drawn = getattr(pipeline, "classes", own["source"])
    for name, known in own.items():
        if known != drawn:
            raise BadArgument(
                metric,
                name,
                f"has the classes {list(known)}, but the model draws {list(drawn)}; give one of "
                f"these classes, or leave {type(metric).__name__} out: --metrics.parts "
                "'[LayoutMeasures, Diversity]'",
            )


def _features(encoder: LayoutEncoder, layouts: Layouts, size: int = 512) -> Tensor:
    """Encode in chunks, on the encoder's device; return features on the CPU."""
    device = encoder.token.device
    starts = range(0, len(layouts), size)
    parts = [encoder(layouts.index(slice(i, i + size)).to(device)).cpu() for i in starts]
    return torch.cat(parts).float()
