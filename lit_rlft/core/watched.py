"""Modules of which much is computed once, until one of their attributes is set anew."""

from typing import Any, ClassVar

from torch import nn

__all__ = ["Watched"]


class Watched(nn.Module):
    """A base of processes and schedules, whose numbers others keep.

    Attributes:
        num_changes: How often an attribute of any of them was set. One count serves all: a process
            has others as its parts, and what is kept is quick to compute again.
    """

    num_changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "training":  # the mode, which is set in each round, means nothing to them
            Watched.num_changes += 1
