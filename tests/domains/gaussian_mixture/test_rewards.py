import pytest
import torch

from domains.gaussian_mixture.closed_form.mixture import MEANS
from domains.gaussian_mixture.rewards import ComponentIndicator, Coordinate, Quadratic
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition

CONDITION = Condition([{"name": "mixture"}], {}, torch.zeros(2, dtype=torch.int64))
POINTS = torch.tensor([[0.5, -1.0], [2.0, 3.0]])


def test_coordinate() -> None:
    points = POINTS.clone().requires_grad_()
    values = Coordinate(1)(points, CONDITION)
    assert values.tolist() == [-1.0, 3.0] and Coordinate.differentiable
    (grad,) = torch.autograd.grad(values.sum(), points)
    assert grad.tolist() == [[0, 1], [0, 1]]


def test_quadratic() -> None:
    points = POINTS.double().requires_grad_()
    values = Quadratic([1.0, 0.0])(points, CONDITION)
    assert values.tolist() == [-1.25, -10.0] and Quadratic.differentiable
    (grad,) = torch.autograd.grad(values.sum(), points)
    assert grad.tolist() == [[1, 2], [-2, -6]]


def test_component_indicator() -> None:
    points = torch.tensor(MEANS) + 0.2
    reward = ComponentIndicator([0, 3])
    assert not reward.differentiable
    assert reward(points, CONDITION).tolist() == [1, 0, 0, 1, 0]
    line = ComponentIndicator([1], [[0.0], [1.0]])
    assert line(torch.tensor([[0.4], [0.6]]), CONDITION).tolist() == [0, 1]


def test_settings_that_cannot_work_are_refused() -> None:
    for build in (
        lambda: Coordinate(-1),
        lambda: Coordinate(2)(POINTS, CONDITION),
        lambda: Quadratic([0.0])(POINTS, CONDITION),
        lambda: ComponentIndicator([]),
        lambda: ComponentIndicator([5]),
        lambda: ComponentIndicator([0], [[0.0], [1.0]])(POINTS, CONDITION),
    ):
        with pytest.raises(UsageError):
            build()
