"""What is wrong with a state or a prediction, in words."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rlft.core.state import State, described

__all__ = ["class_problem", "first_problem", "shape_problem"]


def class_problem(x: State, process: str) -> str | None:
    """Say what x is unless it holds classes.

    Args:
        x: What should be a state.
        process: Whose.
    """
    if isinstance(x, Tensor) and x.dtype == torch.int64:
        return None
    return f"{described(x)}; states of a {process} are int64 tensors"


def shape_problem(prediction: State, shape: Sequence[int]) -> str | None:
    """Say what a prediction is unless it is a tensor of this shape."""
    if not isinstance(prediction, Tensor) or prediction.shape != tuple(shape):
        return f"{described(prediction)}; for these states it is {list(shape)}"
    if not prediction.is_floating_point():
        return f"{described(prediction)}; a prediction is of floats"
    return None


def first_problem(problems: Mapping[str, str | None]) -> str | None:
    """Return the first problem of a state's fields, with the field's name."""
    found = (f"{problem} (field {name!r})" for name, problem in problems.items() if problem)
    return next(found, None)
