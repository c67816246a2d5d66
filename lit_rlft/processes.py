"""Values of all processes of a run in one place."""

from typing import TypeVar

import torch

__all__ = ["gather"]

T = TypeVar("T")


def gather(value: T, world_size: int) -> list[T]:
    """Return the value of every process, in order of rank; all of them must call it."""
    if world_size == 1:
        return [value]
    values = [value] * world_size
    torch.distributed.all_gather_object(values, value)
    return values
