from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum, check_rewards

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


def test_rewards_are_checked_and_cast() -> None:
    values = check_rewards(First(), torch.tensor([1, 0, 1]), 3)
    assert values.dtype == torch.float32 and values.tolist() == [1, 0, 1]
    assert check_rewards(First(), torch.tensor([-torch.inf, 0.0]), 2)[0] == -torch.inf


@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_a_reward_of_the_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="First returned shape"):
        check_rewards(First(), torch.zeros(shape), 3)


def test_a_reward_that_is_not_a_number_is_named() -> None:
    with pytest.raises(UsageError, match="First returned NaN for 1 of 3"):
        check_rewards(First(), torch.tensor([0.0, torch.nan, 1.0]), 3)
