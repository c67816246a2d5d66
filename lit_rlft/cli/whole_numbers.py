"""Whole numbers of Trainer's settings stay whole: 1 is one batch, 1.0 is all of them."""

import inspect
import types
from functools import reduce
from operator import or_
from typing import Any, Union, get_args, get_origin

from lightning import Trainer

__all__ = ["try_whole_numbers_first"]


def try_whole_numbers_first(function: Any = Trainer.__init__) -> None:
    """Put `int` before `float` in a function's annotations, the order in which texts are parsed.

    `typing` keeps one union of the same types. Where any package has made `Union[float, int]`
    optional before Lightning did, Lightning's `Union[int, float]` has that order too, and
    `limit_train_batches: 1` would be read as 1.0.
    """
    annotations = inspect.unwrap(function).__annotations__
    for name, annotation in annotations.items():
        kinds = get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType) and {int, float} <= set(kinds):
            annotations[name] = reduce(or_, sorted(kinds, key=lambda kind: kind is not int))
