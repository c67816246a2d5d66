from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import (
    Metric,
    Metrics,
    Product,
    Reward,
    WeightedSum,
    check_rewards,
    rewards_of,
    values_of,
)

CONDITION = Condition([{}], {}, torch.zeros(3, dtype=torch.int64))
POINTS = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 5.0]])


class First(Reward):
    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 0]


class Second(Reward):
    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 1]


def test_a_reward_reports_itself_under_its_name() -> None:
    values = First().evaluate(POINTS, CONDITION)
    assert list(values) == ["First"] and torch.equal(values["First"], POINTS[:, 0])


def test_weighted_sum() -> None:
    total = WeightedSum({"a": First(), "b": Second()}, {"b": -0.5})
    torch.testing.assert_close(total(POINTS, CONDITION), torch.tensor([0.0, 5.0, -2.5]))
    values = total.evaluate(POINTS, CONDITION)
    assert list(values) == ["WeightedSum", "a", "b"]
    assert torch.equal(values["b"], POINTS[:, 1])
    torch.testing.assert_close(values["WeightedSum"], total(POINTS, CONDITION))


def test_weighted_sum_is_differentiable_if_all_parts_are() -> None:
    assert not WeightedSum({"a": First(), "b": Second()}).differentiable
    both = WeightedSum({"a": First(), "b": First()}, {"a": 2.0})
    assert both.differentiable
    points = POINTS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(both(points, CONDITION).sum(), points)
    assert torch.equal(grad, torch.tensor([3.0, 0.0]).expand(3, 2))


def test_weighted_sum_refuses_what_cannot_work() -> None:
    with pytest.raises(UsageError, match="at least one reward"):
        WeightedSum({})
    with pytest.raises(UsageError, match=r"\['c'\]"):
        WeightedSum({"a": First()}, {"c": 1.0})


def test_parts_are_limited_in_their_units_and_then_brought_to_their_ranges() -> None:
    settings: dict[str, Any] = {
        "ranges": {"a": (1.0, 3.0), "b": (10.0, 0.0)},
        "limits": {"a": (None, 2.0), "b": (-1.0, 4.0)},
    }
    total = WeightedSum({"a": First(), "b": Second()}, {"b": 2.0}, **settings)
    a, b = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([0.8, 1.1, 0.6])
    torch.testing.assert_close(total(POINTS, CONDITION), a + 2 * b)
    values = total.evaluate(POINTS, CONDITION)
    torch.testing.assert_close(values["WeightedSum"], a + 2 * b)
    assert torch.equal(values["a"], POINTS[:, 0])  # reported in their own units
    product = Product({"a": First(), "b": Second()}, **settings)
    torch.testing.assert_close(product(POINTS, CONDITION), a.clamp(min=0) * b)


def test_held_out_parts_are_measured_and_not_trained_on() -> None:
    class Counted(Second):
        calls = 0

        def forward(self, samples: Any, condition: Condition) -> Tensor:
            self.calls += 1
            return super().forward(samples, condition)

    held = Counted()
    total = WeightedSum({"a": First(), "b": held}, held_out=["b"])
    assert total.differentiable and torch.equal(total(POINTS, CONDITION), POINTS[:, 0])
    assert held.calls == 0
    values = total.evaluate(POINTS, CONDITION)
    assert torch.equal(values["b"], POINTS[:, 1]) and torch.equal(
        values["WeightedSum"], values["a"]
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"held_out": ["a", "b"]}, "held_out must leave a reward to train on"),
        ({"held_out": ["c"]}, r"held_out names \['c'\]"),
        ({"ranges": {"a": (1.0, 1.0)}}, "ranges must be pairs, different numbers, got a"),
        ({"ranges": {"a": (0.0, float("nan"))}}, "ranges must be a finite number, got nan"),
        (
            {"limits": {"b": (2.0, 1.0)}},
            "limits must be pairs, a smaller number first, got b",
        ),
        ({"limits": {"b": 2.0}}, "limits must be pairs, a smaller number first, got b: 2"),
        ({"limits": {"x": (0.0, 1.0)}}, r"limits names \['x'\]"),
    ],
)
def test_combinations_refuse_what_cannot_work(settings: dict[str, Any], sentence: str) -> None:
    for kind in (WeightedSum, Product):
        with pytest.raises(UsageError, match=sentence):
            kind({"a": First(), "b": Second()}, **settings)


def test_rewards_are_checked_and_cast() -> None:
    values = check_rewards(First(), torch.tensor([1, 0, 1]), 3)
    assert values.dtype == torch.float32 and values.tolist() == [1, 0, 1]
    for given in (torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0]).half()):
        values = check_rewards(First(), given, 3)
        assert values.dtype == torch.float32 and values.tolist() == [1, 0, 1]


def test_rewards_carry_a_gradient_only_where_one_is_computed() -> None:
    given = torch.ones(3, requires_grad=True) * 2
    assert check_rewards(First(), given, 3).requires_grad
    with torch.no_grad():
        assert not check_rewards(First(), given, 3).requires_grad


@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_a_reward_of_the_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="First returned shape"):
        check_rewards(First(), torch.zeros(shape), 3)


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [
        (torch.nan, torch.float32, "NaN"),
        (torch.inf, torch.float32, "inf"),
        (-torch.inf, torch.float16, "-inf"),
        (1e300, torch.float64, r"1e\+300"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_named(
    value: float, dtype: torch.dtype, shown: str
) -> None:
    values = torch.tensor([0.0, value, 1.0], dtype=dtype)
    with pytest.raises(UsageError, match=f"First returned {shown} for 1 of 3.*finite low reward"):
        check_rewards(First(), values, 3)
    failed = check_rewards(First(), values, 3, may_fail=True)
    assert failed.isnan().tolist() == [False, True, False]


def test_complex_rewards_are_refused() -> None:
    with pytest.raises(UsageError, match="First returned complex numbers"):
        check_rewards(First(), torch.zeros(3, dtype=torch.complex64), 3)


@dataclass(frozen=True)
class Pairs:
    left: Tensor
    right: Tensor


class InPlace(Reward):
    """Changes a tensor of the samples, wherever it is."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        tensor = samples.right if isinstance(samples, Pairs) else samples
        return tensor[:, 0].mul_(2)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("form", [Tensor.clone, lambda points: Pairs(points, points.clone())])
def test_samples_changed_in_place_are_refused(form: Any, inference: bool) -> None:
    with torch.inference_mode(inference):
        for look in (rewards_of, values_of):
            with pytest.raises(UsageError, match=r"InPlace changes.*samples = samples\.clone\(\)"):
                look(InPlace(), form(POINTS), CONDITION)
        holes = POINTS.clone()
        holes[2] = torch.nan
        assert rewards_of(First(), holes[:2], CONDITION.index(slice(0, 2))).tolist() == [1, 3]
        assert values_of(Second(), holes, CONDITION)["Second"].isnan().tolist() == [0, 0, 1]


class Answer(Metric):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (torch.zeros(3), "Answer.evaluate returned a Tensor; return a dict"),
        ({"a": [0.0, 1.0, 2.0]}, r"\['a'\] returned a list; a metric returns a tensor"),
        ({"a": torch.zeros(3, 1)}, r"\['a'\] returned shape \(3, 1\) for 3 samples"),
        ({"a": torch.zeros(3) * 1j}, r"\['a'\] returned complex numbers"),
    ],
)
def test_a_metric_that_answers_something_else_is_named(answer: Any, sentence: str) -> None:
    for metric in (Answer(answer), Metrics([Answer(answer)])):
        with pytest.raises(UsageError, match=sentence):
            values_of(metric, POINTS, CONDITION)


def test_values_of_metrics_become_real_numbers() -> None:
    values = values_of(Metrics([Answer({"a": POINTS[:, 0] > 0})]), POINTS, CONDITION)
    assert values["a"].dtype == torch.float32 and values["a"].tolist() == [1, 1, 0]


class Cut(Reward):
    """Claims a gradient, and returns what it is told to make of the samples."""

    differentiable = True

    def __init__(self, values: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.values = values

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return self.values(samples)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x[:, 0].detach(),
    "no_grad": torch.no_grad()(lambda x: x[:, 0]),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()[:, 0]),
    "comparison": lambda x: x[:, 0] > 1,
    "some fail": lambda x: x[:, 0].detach().where(x[:, 0] > 1, torch.nan),
}


@pytest.mark.parametrize("values", CUTS.values(), ids=CUTS)
def test_a_reward_that_only_claims_to_have_a_gradient_is_named(
    values: Callable[[Tensor], Tensor],
) -> None:
    sentence = r"^Cut has differentiable = True, but its values have no gradient; look for .* use"
    leaf = torch.arange(6.0).view(3, 2).requires_grad_()
    for alone, samples in product((True, False), (leaf, 1 * leaf)):
        cut = Cut(values)
        reward = cut if alone else WeightedSum({"a": cut, "b": First()})
        with pytest.raises(UsageError, match=sentence):
            rewards_of(reward, samples, CONDITION, may_fail=True)
        with torch.no_grad():  # nobody asks for one
            rewards_of(reward, samples, CONDITION, may_fail=True)
        rewards_of(reward, samples.detach(), CONDITION, may_fail=True)
        cut.differentiable = False
        rewards_of(cut, samples, CONDITION, may_fail=True)


def test_a_reward_may_be_constant_where_nothing_applies() -> None:
    samples = torch.arange(6.0).view(3, 2).requires_grad_()
    same = Cut(lambda x: torch.ones(len(x)))
    for _ in range(2):
        rewards_of(same, samples, CONDITION)
    penalties = [0.0, -1.0]  # which may change in the course of training
    falls = Cut(lambda x: torch.full((len(x),), penalties.pop(0)))
    assert [rewards_of(falls, samples, CONDITION)[0] for _ in range(2)] == [0.0, -1.0]
    own = samples.detach()[:, 0].requires_grad_()
    assert rewards_of(Cut(lambda x: x), own, CONDITION) is own
    # One that has a gradient elsewhere may return what a condition says.
    now: list[Tensor] = [samples[:, 0], torch.tensor([1.0, 1.0, 2.0])]
    known = Cut(lambda x: now.pop(0))
    assert rewards_of(known, samples, CONDITION).requires_grad
    assert not rewards_of(known, samples, CONDITION).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_rewards_come_to_the_samples_device() -> None:
    class Elsewhere(First):
        def forward(self, samples: Any, condition: Condition) -> Tensor:
            return samples[:, 0].cpu()

    assert rewards_of(Elsewhere(), POINTS.cuda(), CONDITION).is_cuda


class Detailed(Reward):
    """Its detail begins with the letters of its name."""

    name = "D"

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 0]

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        own = self(samples, condition)
        return {"D": own, "D/share": own, "Distance": own, "share/D": own}


def test_details_of_parts_keep_their_names() -> None:
    values = WeightedSum({"a": Detailed()}).evaluate(POINTS, CONDITION)
    assert list(values) == ["WeightedSum", "a", "a/share", "a/Distance", "a/share/D"]


@pytest.mark.parametrize("kind", [WeightedSum, Product])
def test_parts_that_reports_would_mistake_are_refused(kind: Any) -> None:
    name = kind.__name__
    for part, what in ((name, f"the {name} itself"), ("kl", "the divergence from the reference")):
        with pytest.raises(BadArgument) as caught:
            kind({"a": First(), part: Second()})
        problem = f"rewards has a part called {part!r}, as reports call {what}"
        assert str(caught.value) == f"{name}: {problem}; give it another name"
    with pytest.raises(BadArgument, match="'a/x', which reads as a detail of its part 'a'"):
        kind({"a/x": First(), "a": Second()})
    for part in ("a.b", "keys", "", 1):
        with pytest.raises(BadArgument, match=f"{name}: rewards has a name that torch cannot take"):
            kind({part: First()})


def test_so_is_one_that_is_called_like_the_name_of_an_instance() -> None:
    class Mine(WeightedSum):
        name = "total"

    with pytest.raises(BadArgument, match="Mine: rewards has a part called 'total'"):
        Mine({"total": First()})

    class Late(WeightedSum):
        title = "b"

        @property
        def name(self) -> str:
            return self.title

    late = Late({"a": First()})
    late.title = "a"
    with pytest.raises(BadArgument, match="Late: rewards has a part called 'a'"):
        late.evaluate(POINTS, CONDITION)


def test_an_evaluation_without_the_reward_itself_is_named() -> None:
    class D(Reward):
        def forward(self, samples: Any, condition: Condition) -> Tensor:
            return samples[:, 0]

        def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
            return {"detail": samples[:, 1]}

    for reward in (D(), WeightedSum({"a": D()})):
        with pytest.raises(UsageError, match=r"^D\.evaluate\(\) lacks 'D'; return the reward"):
            values_of(reward, POINTS, CONDITION)
