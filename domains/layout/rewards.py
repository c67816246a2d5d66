"""Rewards of layouts, higher is better.

Alignment and overlap alone are easily gamed: identical boxes on top of each other are aligned,
boxes of no size do not overlap, and one box alone does neither. Overlap, coverage, size and count
beside alignment close these ways. Alignment and overlap are -1 for layouts of fewer than two
elements: less than pages have whose A or O is below 1, but more than the worst pages, of which A
reaches 13.8 and O the number of elements minus 1. Emptying such a page pays; the metric
"num_elements" shows it.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.layout.networks.encoder import load_encoder
from domains.layout.page import measures
from domains.layout.page.classes import CLASS_LISTS, check_names, number_of
from domains.layout.render import each
from domains.layout.samples import Layouts, check_layouts
from lit_rlft.core.checks import BadArgument, UsageError, at_least, positive, reading, within
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.kit.called import name_of, numbers_of
from lit_rlft.kit.judge import Judge, Output

__all__ = [
    "Alignment",
    "ClassCounts",
    "Count",
    "Coverage",
    "Critic",
    "FunctionReward",
    "GapRegularity",
    "GrammarRules",
    "InsidePage",
    "MinimumSize",
    "Overlap",
    "Relations",
]

_GRAMMAR = CLASS_LISTS["publaynet"]  # the classes of the page grammar
_TOO_FEW = -1.0  # reward of fewer than two elements; pages whose A or O exceeds 1 have less


class _Twinned(Reward):
    """A reward whose value is exact and whose gradient is that of its smooth twin.

    Algorithms without gradients and evaluations see the exact value, whatever else uses the reward.
    """

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each layout, [B]."""
        layouts = check_layouts(samples, condition)
        exact = self.value(layouts.detach())
        if not (torch.is_grad_enabled() and layouts.boxes.requires_grad):
            return exact
        twin = self.value(layouts, smooth=True)
        return exact + (twin - twin.detach())

    @abstractmethod
    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        """Return the exact reward, or its twin, [B]."""


class Alignment(_Twinned):
    """How well elements align: minus A, in [-13.82, 0]; -1 for fewer than two elements.

    Pages with A above 1, whose elements have no line nearer than 0.63 pages, have less than that.
    """

    distinguishes = True

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        return _unless_few(-measures.alignment(layouts, smooth=smooth), layouts)


class Overlap(_Twinned):
    """How little elements overlap: minus O, in [1 - N, 0]; -1 for fewer than two elements.

    Pages with O above 1 have less than that: three boxes on top of each other have O = 2.

    Args:
        ignored: Names of classes that are left out, such as RICO's "Background Image".
    """

    distinguishes = True

    def __init__(self, ignored: Sequence[str] = ()) -> None:
        super().__init__()
        self.ignored = tuple(ignored)

    def check(self, pipeline: Pipeline) -> None:
        check_names(self.ignored, pipeline, _key("ignored"))

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        labels = [_number(name, layouts.classes, "ignored") for name in self.ignored]
        ignored = torch.tensor(labels, device=layouts.labels.device) if labels else None
        return _unless_few(-measures.overlap(layouts, smooth=smooth, ignored=ignored), layouts)


class Coverage(_Twinned):
    r"""How close the covered share a of the page is to a target, in (0, 1].

    .. math:: r = \exp(-((a - a^*) / w)^2)

    Args:
        target: a*, the share where the reward is 1; the page grammar's mean unless given.
        width: w, how far from it the reward falls to 1 / e.
    """

    def __init__(self, target: float = 0.56, width: float = 0.15) -> None:
        super().__init__()
        within(0, 1, self, target=target)
        positive(self, width=width)
        self.target, self.width = target, width

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        share = measures.coverage(layouts, smooth=smooth)
        return torch.exp(-(((share - self.target) / self.width) ** 2))


class InsidePage(_Twinned):
    """Mean share of an element's area that lies on the page, in [0, 1]; 0 without elements."""

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        return measures.inside_page(layouts, smooth=smooth)


class MinimumSize(_Twinned):
    """Share of elements of at least a minimum size, in [0, 1]; 0 without elements.

    Args:
        min_width: Smallest width, in page widths.
        min_height: Smallest height, in page heights.
    """

    def __init__(self, min_width: float = 0.02, min_height: float = 0.006) -> None:
        super().__init__()
        positive(self, min_width=min_width, min_height=min_height)
        self.min_width, self.min_height = min_width, min_height

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        return measures.share_of_size(layouts, self.min_width, self.min_height, smooth=smooth)


class Count(_Twinned):
    r"""How close the number of elements N is to a target, in (0, 1].

    .. math:: r = \exp(-((N - N^*) / w)^2)

    Args:
        target: N*.
        width: w.
    """

    def __init__(self, target: float = 8.0, width: float = 3.0) -> None:
        super().__init__()
        at_least(0, self, target=target)
        positive(self, width=width)
        self.target, self.width = target, width

    def value(self, layouts: Layouts, *, smooth: bool = False) -> Tensor:
        count = measures.num_elements(layouts, smooth=smooth)
        return torch.exp(-(((count - self.target) / self.width) ** 2))


class GapRegularity(Reward):
    r"""How equal the vertical gaps within columns are, in (0, 1]; 1 for fewer than two gaps.

    .. math:: r = \exp(-\mathrm{std}(\text{gaps}) / w)

    Args:
        width: w, in page heights.
    """

    differentiable = True

    def __init__(self, width: float = 0.02) -> None:
        super().__init__()
        positive(self, width=width)
        self.width = width

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each layout, [B]."""
        deviation = measures.gap_deviation(check_layouts(samples, condition))
        return torch.exp(-deviation / self.width)


class Relations(Reward):
    """Share of relations between classes that hold, in [0, 1]; 1 where none applies.

    A relation has to hold between every two elements of its classes. One of a class with itself is
    asked of both orders of each pair, of which at most one holds: its share is at most 1 / 2.

    Args:
        relations: Triples such as ["figure", "above", "text"]: "above", "below", "left of",
            "right of" compare centres along an axis, and "larger than", "smaller than" areas.

    References:
        Constrained Graphic Layout Generation via Latent Optimization (Kikuchi et al., 2021),
        https://arxiv.org/abs/2108.00871
    """

    def __init__(self, relations: Sequence[tuple[str, str, str]]) -> None:
        super().__init__()
        self.relations = [tuple(relation) for relation in relations]
        unknown = sorted({name for _, name, _ in self.relations} - set(_RELATIONS))
        if unknown or not self.relations:
            raise UsageError(
                f"reward.init_args.relations needs triples [class, relation, class] with one of "
                f"{list(_RELATIONS)}, got {unknown or 'none'}"
            )

    def check(self, pipeline: Pipeline) -> None:
        named = (name for first, _, second in self.relations for name in (first, second))
        check_names(named, pipeline, _key("relations"))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the share of each layout, [B]; NaN where a box is not finite."""
        layouts = check_layouts(samples, condition)
        held = torch.zeros(len(layouts), device=layouts.boxes.device)
        asked = torch.zeros_like(held)
        for first, name, second in self.relations:
            a, b = (
                layouts.labels == _number(c, layouts.classes, "relations") for c in (first, second)
            )
            pairs = a.unsqueeze(2) & b.unsqueeze(1)
            pairs &= ~torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)
            held += (pairs & _RELATIONS[name](layouts.boxes)).sum(dim=(1, 2))
            asked += pairs.sum(dim=(1, 2))
        return _share(held, asked, layouts)


def _share(held: Tensor, asked: Tensor, layouts: Layouts) -> Tensor:
    """Return held / asked, 1 where nothing is asked, NaN for a page that cannot be drawn."""
    share = (held / asked.clamp(min=1)).where(asked > 0, 1)
    return share.where(layouts.finite, torch.nan)


class ClassCounts(Reward):
    r"""How close the numbers of elements per class are to a target, in (0, 1].

    .. math:: r = \exp(-\tfrac12 \|c - c^*\|_1)

    Args:
        counts: Wanted number by class; classes that are not named are free.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        at_least(0, self, counts=counts)
        if not counts:
            raise BadArgument(self, "counts", "must name at least one class")
        self.counts: Mapping[str, int] = dict(counts)

    def check(self, pipeline: Pipeline) -> None:
        check_names(self.counts, pipeline, _key("counts"))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each layout, [B]."""
        layouts = check_layouts(samples, condition)
        numbers = [_number(name, layouts.classes, "counts") for name in self.counts]
        found = torch.stack([(layouts.labels == number).sum(dim=1) for number in numbers], dim=1)
        wanted = torch.tensor([*self.counts.values()], device=found.device)
        return torch.exp(-(found - wanted).abs().sum(dim=1) / 2)


class GrammarRules(Reward):
    """Share of headings, figures and tables that stand where a page's grammar puts them, in [0, 1].

    A title has text or a list below it, flush left; a figure or table has text next to it, above
    or below, as wide as most of it: its caption. 1 where a page has none of these.

    Args:
        distance: Largest gap to the neighbour, in page heights.
        flush: Largest difference of left edges, in page widths.
        common: Smallest share of the narrower width that float and caption have in common.
    """

    def __init__(self, distance: float = 0.03, flush: float = 0.02, common: float = 0.8) -> None:
        super().__init__()
        at_least(0, self, distance=distance, flush=flush)
        within(0, 1, self, common=common)
        self.distance, self.flush, self.common = distance, flush, common

    def check(self, pipeline: Pipeline) -> None:
        check_names(_GRAMMAR, pipeline, "reward: GrammarRules")

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the share of each layout, [B]; NaN where a box is not finite.

        Raises:
            UsageError: The classes are not PubLayNet's.
        """
        layouts = check_layouts(samples, condition)
        numbers = [number_of(name, layouts.classes, "reward: GrammarRules") for name in _GRAMMAR]
        text, title, listed, table, figure = (layouts.labels == number for number in numbers)
        left, top, right, bottom = layouts.edges.unbind(dim=-1)
        gap = (top.unsqueeze(1) - bottom.unsqueeze(2)).abs() <= self.distance  # j below i
        flush = (left.unsqueeze(1) - left.unsqueeze(2)).abs() <= self.flush
        follows = (gap & flush & (text | listed).unsqueeze(1)).any(dim=2)
        narrower = torch.minimum((right - left).unsqueeze(1), (right - left).unsqueeze(2))
        common = torch.minimum(right.unsqueeze(1), right.unsqueeze(2)) - torch.maximum(
            left.unsqueeze(1), left.unsqueeze(2)
        )
        near = (gap | gap.transpose(1, 2)) & (common >= self.common * narrower)
        captioned = (near & text.unsqueeze(1)).any(dim=2)
        floats = table | figure
        held = (title & follows).sum(dim=1) + (floats & captioned).sum(dim=1)
        asked = (title | floats).sum(dim=1)
        return _share(held, asked, layouts)


class FunctionReward(Reward):
    """Scores layouts by any Python function: of another package, or of one's own.

    Args:
        function: Takes a list of layouts and returns a number per layout, or None for one that it
            could not score. A layout is a list of elements, each a pair of its class and its box
            [left, top, width, height] in fractions of the page. On the command line the function's
            path, such as my_scores.balance.

    Raises:
        UsageError: The function returns something else.
    """

    def __init__(
        self,
        function: Callable[[list[list[tuple[str, list[float]]]]], Sequence[float | None]],
    ) -> None:
        super().__init__()
        self.function = function

    @property
    def name(self) -> str:
        return name_of(self.function, type(self).__name__)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each layout, [B]."""
        layouts = [
            [(e.label, [e.left, e.top, e.width, e.height]) for e in elements]
            for elements in each(check_layouts(samples, condition))
        ]
        return torch.tensor(numbers_of(self.function, "layouts", layouts))


class Critic(Judge):
    """How real a layout looks to a trained critic: a logit, a log-probability or a probability.

    Differentiable with respect to boxes; classes and empty slots are taken as they are. The network
    is frozen, always in evaluation mode, and computes in single precision also under autocast.

    Args:
        pretrained: A folder that `LayoutEncoder.save` wrote, or "critic", the embedded one.
        output: "logit" has no bounds; "log_probability" is in (-inf, 0], "probability" in [0, 1].

    Raises:
        UsageError: `pretrained` is no such folder, or `output` is unknown.
    """

    def __init__(self, pretrained: str = "critic", output: Output = "log_probability") -> None:
        super().__init__(output)
        self.distinguishes = output != "probability"  # one can be 1, or 0, for all of them
        with reading(self, "pretrained"):
            self.encoder = load_encoder(pretrained)

    def check(self, pipeline: Pipeline) -> None:
        with reading(self, "pretrained"):
            self.encoder.check_classes(getattr(pipeline, "classes", self.encoder.classes))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the critic's judgement of each layout, [B]."""
        layouts = check_layouts(samples, condition)
        with torch.autocast(layouts.boxes.device.type, enabled=False):
            logits = self.encoder.logits(self.encoder(layouts))
        return self.verdict(logits)


def _unless_few(rewards: Tensor, layouts: Layouts) -> Tensor:
    return rewards.where(layouts.num_elements >= 2, _TOO_FEW)


def _number(name: str, classes: Sequence[str], argument: str) -> int:
    return number_of(name, classes, _key(argument))


def _key(argument: str) -> str:
    return f"reward.init_args.{argument}"


def _along(axis: int, sign: float) -> Callable[[Tensor], Tensor]:
    """Return a comparison of centres: whether i lies before j, [B, N, N]."""

    def compare(boxes: Tensor) -> Tensor:
        centres = sign * boxes[..., axis]
        return centres.unsqueeze(2) < centres.unsqueeze(1)

    return compare


def _sized(sign: float) -> Callable[[Tensor], Tensor]:
    """Return a comparison of areas: whether i is the smaller (+1) or larger (-1), [B, N, N]."""

    def compare(boxes: Tensor) -> Tensor:
        areas = sign * boxes[..., 2] * boxes[..., 3]
        return areas.unsqueeze(2) < areas.unsqueeze(1)

    return compare


_RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "above": _along(1, 1.0),
    "below": _along(1, -1.0),
    "left of": _along(0, 1.0),
    "right of": _along(0, -1.0),
    "smaller than": _sized(1.0),
    "larger than": _sized(-1.0),
}
