"""Rewards of layouts: values by hand, ranges, twins, the ways in which they could be gamed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from domains.layout import rewards
from domains.layout.metrics import source_layouts
from domains.layout.networks.encoder import jittered
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Critic
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum
from tests.domains.layout.page.test_measures import NAMES, layout, noisy_pages

SMOOTH = [
    rewards.Alignment,
    rewards.Overlap,
    rewards.Coverage,
    rewards.InsidePage,
    rewards.MinimumSize,
    rewards.Count,
]
RELATIONS = [("title", "above", "text"), ("figure", "larger than", "title")]
OTHERS = [
    rewards.GapRegularity(),
    rewards.GrammarRules(),
    rewards.Relations(RELATIONS),
    rewards.ClassCounts({"text": 4, "figure": 1}),
    Critic(),
    Critic(output="probability"),
]


def condition(num: int) -> Condition:
    return Condition(entries=[{}], tables={}, rows=torch.zeros(num, dtype=torch.int64))


def value(reward: Reward, layouts: Layouts) -> float:
    return float(reward(layouts, condition(len(layouts)))[0])


@pytest.mark.parametrize("reward", [*(cls() for cls in SMOOTH), *OTHERS])
def test_rewards_are_finite_numbers_per_layout(reward: Reward) -> None:
    pages = noisy_pages(30)
    empty = layout(slots=12)
    both = Layouts.of(
        torch.cat([pages.boxes, empty.boxes]).float(),
        torch.cat([pages.labels, empty.labels]),
        NAMES,
    )
    values = reward(both, condition(31))
    assert values.shape == (31,) and values.isfinite().all()
    # Better on real pages than on badly shaken ones, or at least not worse.
    real = source_layouts(Grammar(200, seed=2))
    shaken = jittered(real, torch.full((200,), 0.08), torch.Generator().manual_seed(0))
    means = [reward(x, condition(200)).mean() for x in (real, shaken)]
    if not isinstance(reward, rewards.Count | rewards.ClassCounts):
        assert means[0] >= means[1] - 1e-6


@pytest.mark.parametrize("cls", SMOOTH)
def test_values_are_exact_and_gradients_those_of_the_smooth_twin(cls: Any) -> None:
    pages, reward = noisy_pages(30), cls()
    presence = (pages.presence + 0.1 * torch.rand(pages.presence.shape)).clamp(max=1)
    boxes, presence = pages.boxes.clone().requires_grad_(), presence.requires_grad_()
    layouts = Layouts(boxes, pages.labels, presence, NAMES)
    values = reward(layouts, condition(30))
    assert torch.equal(values.detach(), reward(pages, condition(30)))
    twin = reward.value(layouts, smooth=True)
    assert not torch.allclose(twin, values)
    for x in (boxes, presence):
        ours, theirs = (
            torch.autograd.grad(v.sum(), x, retain_graph=True, allow_unused=True)[0]
            for v in (values, twin)
        )
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(reward(layouts, condition(30)), values)


def test_layouts_of_fewer_than_two_elements_are_worse_than_shaken_pages() -> None:
    worst = jittered(
        source_layouts(Grammar(100)), torch.full((100,), 0.1), torch.Generator().manual_seed(0)
    )
    few = [layout(), layout((0, 0.1, 0.1, 0.9, 0.9))]
    alignment = rewards.Alignment()
    assert max(value(alignment, x) for x in few) < alignment(worst, condition(100)).min()
    assert [value(rewards.Overlap(), x) for x in few] == [-1, -1]
    # The worst pages are worse still: no line nearer than 0.98, eight boxes on top of each other.
    corners = layout((0, 0.0, 0.0, 0.02, 0.02), (1, 0.98, 0.98, 1.0, 1.0))
    assert value(alignment, corners) == pytest.approx(math.log(0.02))
    stack = layout(*[(0, 0.3, 0.3, 0.7, 0.7)] * 8, slots=8)
    assert value(rewards.Overlap(), stack) == pytest.approx(-7)


def test_a_relation_of_a_class_with_itself_holds_for_half_of_the_pairs() -> None:
    pages = layout((0, 0.4, 0.1, 0.6, 0.2), (0, 0.4, 0.4, 0.6, 0.5))
    assert value(rewards.Relations([("text", "above", "text")]), pages) == 0.5


def test_boxes_of_exactly_the_smallest_size_are_large_enough() -> None:
    pages = layout((0, 0.25, 0.25, 0.5, 0.75), (0, 0.25, 0.25, 0.46875, 0.75))
    assert value(rewards.MinimumSize(0.25, 0.5), pages) == 0.5


BOX_REWARDS = [
    *(cls() for cls in SMOOTH if cls is not rewards.Count),
    *OTHERS[:3],
]


@pytest.mark.parametrize("reward", BOX_REWARDS)
@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_pages_with_a_box_that_is_not_finite_have_no_number(reward: Reward, lost: float) -> None:
    """A NaN was taken for a perfect line."""
    pages = noisy_pages(3)
    boxes = pages.boxes.clone()
    boxes[1, pages.valid[1].nonzero()[0], 2] = lost
    found = reward(Layouts.of(boxes, pages.labels, NAMES), condition(3))
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[[0, 2]], reward(pages, condition(3))[[0, 2]])


@pytest.mark.parametrize("reward", [*BOX_REWARDS, *OTHERS[3:]])
@pytest.mark.parametrize("lost", [math.nan, math.inf, -1e6])
def test_empty_slots_may_hold_anything(reward: Reward, lost: float) -> None:
    pages = noisy_pages(20)
    pages = Layouts.of(pages.boxes.float(), pages.labels, NAMES)
    boxes = pages.boxes.clone()
    assert (~pages.valid).any()
    boxes[~pages.valid] = lost
    found, expected = (
        reward(Layouts.of(x.requires_grad_(), pages.labels, NAMES), condition(20))
        for x in (boxes, pages.boxes)
    )
    assert torch.equal(found, expected)
    if found.requires_grad:
        (gradient,) = torch.autograd.grad(found.sum(), boxes)
        assert gradient.isfinite().all()


def test_known_ways_of_gaming_do_not_pay() -> None:
    parts: dict[str, Reward] = {
        "overlap": rewards.Overlap(),
        "alignment": rewards.Alignment(),
        "coverage": rewards.Coverage(),
        "inside_page": rewards.InsidePage(),
    }
    reward = WeightedSum(parts, {"alignment": 10.0, "coverage": 0.5})
    pages = source_layouts(Grammar(100, seed=4))
    honest = float(reward(pages, condition(100)).mean())
    text = (0, 0.1, 0.1, 0.9, 0.66)
    hacks = {
        "stacked": layout(text, text, text),
        "tiny": layout(*[(0, 0.1, 0.1 * i, 0.102, 0.1 * i + 0.002) for i in range(1, 5)]),
        "vanished": layout((0, 0.1, 0.1, 0.1, 0.1), (0, 0.1, 0.2, 0.1, 0.2)),
        "outside": layout((0, 1.1, 0.1, 1.9, 0.4), (0, 1.1, 0.5, 1.9, 0.9)),
        "one": layout(text),
        "none": layout(),
    }
    for name, hack in hacks.items():
        assert value(reward, hack) < honest - 0.1, name


def test_coverage_count_and_gaps_by_hand() -> None:
    half = layout((0, 0, 0, 1, 0.5))
    assert value(rewards.Coverage(target=0.5), half) == pytest.approx(1)
    assert value(rewards.Coverage(target=0.65, width=0.15), half) == pytest.approx(math.exp(-1))
    assert value(rewards.Count(target=4, width=3), half) == pytest.approx(math.exp(-1))
    stack = layout((0, 0, 0, 1, 0.1), (0, 0, 0.12, 1, 0.2), (0, 0, 0.26, 1, 0.3))
    assert value(rewards.GapRegularity(0.02), stack) == pytest.approx(math.exp(-1), rel=1e-3)
    assert value(rewards.GapRegularity(), half) == 1


def test_relations_by_hand() -> None:
    page = layout((1, 0.1, 0.1, 0.3, 0.15), (0, 0.1, 0.2, 0.9, 0.4), (0, 0.1, 0.02, 0.9, 0.05))
    assert value(rewards.Relations([("title", "above", "text")]), page) == 0.5
    assert value(rewards.Relations([("text", "below", "title")]), page) == 0.5
    assert value(rewards.Relations([("title", "left of", "text")]), page) == 1
    assert value(rewards.Relations([("text", "right of", "title")]), page) == 1
    assert value(rewards.Relations([("title", "smaller than", "text")]), page) == 1
    assert value(rewards.Relations([("title", "larger than", "text")]), page) == 0
    assert value(rewards.Relations([("figure", "above", "text")]), page) == 1
    # Two of "above" (one holds), two of "smaller than" (both hold).
    both = rewards.Relations([("title", "above", "text"), ("title", "smaller than", "text")])
    assert value(both, page) == 0.75
    # Of two texts one lies above the other, and not the other way round; none above itself.
    assert value(rewards.Relations([("text", "above", "text")]), page) == 0.5


def test_ignored_classes_do_not_overlap() -> None:
    page = layout((4, 0, 0, 1, 1), (0, 0.1, 0.1, 0.5, 0.5), (0, 0.3, 0.1, 0.7, 0.5))
    assert value(rewards.Overlap(ignored=["figure"]), page) == pytest.approx(-0.5)
    assert value(rewards.Overlap(), page) < -1


def test_class_counts_by_hand() -> None:
    page = layout((1, 0.1, 0.1, 0.3, 0.15), (0, 0.1, 0.2, 0.9, 0.4))
    assert value(rewards.ClassCounts({"text": 1, "title": 1}), page) == 1
    wanted = rewards.ClassCounts({"text": 3, "figure": 1})
    assert value(wanted, page) == pytest.approx(math.exp(-1.5))


def test_grammar_rules_by_hand() -> None:
    title, text = (1, 0.1, 0.1, 0.3, 0.12), (0, 0.1, 0.13, 0.9, 0.3)
    figure, caption = (4, 0.1, 0.4, 0.9, 0.6), (0, 0.1, 0.61, 0.9, 0.63)
    rule = rewards.GrammarRules()
    assert value(rule, layout(title, text, figure, caption)) == 1
    assert value(rule, layout(title, (0, 0.2, 0.13, 0.9, 0.3), figure, caption)) == 0.5
    assert value(rule, layout(title, (0, 0.1, 0.2, 0.9, 0.3), figure)) == 0
    above = (0, 0.1, 0.37, 0.9, 0.39)
    assert value(rule, layout(above, (3, 0.1, 0.4, 0.9, 0.6))) == 1
    assert value(rule, layout((0, 0.1, 0.37, 0.3, 0.39), (3, 0.25, 0.4, 0.9, 0.6))) == 0
    assert value(rule, layout(text, caption)) == 1
    # A list may follow a title, text above it does not; captions may be narrow.
    assert value(rule, layout(title, (2, 0.1, 0.13, 0.9, 0.3))) == 1
    assert value(rule, layout((0, 0.1, 0.07, 0.9, 0.09), title)) == 0
    assert value(rule, layout((0, 0.4, 0.37, 0.6, 0.39), (3, 0.1, 0.4, 0.9, 0.6))) == 1
    real = rule(source_layouts(Grammar(300, seed=9)), condition(300)).mean()
    assert real > 0.8


def test_the_critic_knows_real_pages_and_has_a_gradient() -> None:
    real = source_layouts(Grammar(300, seed=12))
    shaken = jittered(real, torch.full((300,), 0.01), torch.Generator().manual_seed(0))
    critic = Critic(output="logit")
    right = [(critic(real, condition(300)) > 0), (critic(shaken, condition(300)) < 0)]
    assert torch.cat(right).float().mean() > 0.9
    boxes = shaken.boxes.clone().requires_grad_()
    moved = Layouts(boxes, shaken.labels, shaken.presence, shaken.classes)
    (grad,) = torch.autograd.grad(Critic()(moved, condition(300)).sum(), boxes)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    assert not any(p.requires_grad for p in critic.parameters())
    assert not critic.train().training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewards.Coverage(width=0), "width must be positive"),
        (lambda: rewards.MinimumSize(min_width=-1), "min_width must be positive"),
        (lambda: rewards.Relations([("text", "near", "title")]), r"got \['near'\]"),
        (lambda: rewards.Relations([]), "needs triples"),
        (lambda: rewards.ClassCounts({"text": -1}), "counts must be at least 0"),
        (lambda: Critic(output="score"), "output is 'score'"),  # type: ignore[arg-type]
        (lambda: Critic("missing"), "could not be loaded as a layout encoder"),
    ],
)
def test_settings_that_cannot_work(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_samples_and_classes_that_do_not_fit() -> None:
    page = layout((1, 0.1, 0.1, 0.3, 0.15))
    with pytest.raises(UsageError, match="takes layouts, got Tensor"):
        rewards.Alignment()(page.boxes, condition(1))
    with pytest.raises(UsageError, match="1 layouts were given for 2 conditions"):
        rewards.Alignment()(page, condition(2))
    with pytest.raises(UsageError, match="names the class 'chart'"):
        rewards.ClassCounts({"chart": 1})(page, condition(1))
    with pytest.raises(UsageError, match="names the class 'Image'"):
        rewards.Overlap(ignored=["Image"])(page, condition(1))
    screen = Layouts.of(page.boxes, page.labels, ("a", "b"))
    with pytest.raises(UsageError, match="encoder was trained for the classes"):
        Critic()(screen, condition(1))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (rewards.Overlap(ignored=["text"]), "reward.init_args.ignored names the class 'text'"),
        (rewards.Relations([("logo", "above", "text")]), "relations names the class 'text'"),
        (rewards.ClassCounts({"text": 1}), "counts names the class 'text'"),
        (rewards.GrammarRules(), "GrammarRules names the class 'text'"),
        (Critic(), "pretrained cannot be used: this encoder was trained for the classes"),
    ],
)
def test_other_classes_are_told_before_anything_is_drawn(
    reward: Reward, message: str, tiny_pipeline: Callable[..., LayoutPipeline]
) -> None:
    with pytest.raises(UsageError, match=message):
        reward.check(tiny_pipeline(classes=("logo", "photo")))
    more = ("logo", *NAMES) if isinstance(reward, rewards.Relations) else NAMES
    reward.check(tiny_pipeline(classes=more))


def test_a_function_gets_classes_and_boxes() -> None:
    seen: list[Any] = []

    def count(layouts: list[list[tuple[str, list[float]]]]) -> list[float | None]:
        seen.extend(layouts)
        return [float(len(elements)) for elements in layouts]

    pages = layout((0, 0.2, 0.05, 0.8, 0.15), (1, 0.1, 0.3, 0.9, 0.7))
    reward = rewards.FunctionReward(count)
    assert value(reward, pages) == 2 and reward.name == "count"
    (label, box), *_ = seen[0]
    assert label == NAMES[0] and box == pytest.approx([0.2, 0.05, 0.6, 0.1])


def test_a_function_that_returns_no_numbers_is_told() -> None:
    pages = layout((0, 0.2, 0.05, 0.8, 0.15))
    with pytest.raises(UsageError, match="return one number, or None, for each of the layouts"):
        rewards.FunctionReward(lambda layouts: ["good"])(pages, condition(1))
