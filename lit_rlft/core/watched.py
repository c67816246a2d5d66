"""Modules of which much is computed once, until one of their attributes is set anew."""

from typing import Any, ClassVar

from torch import nn

__all__ = ["Watched"]

_PLAIN = (bool, int, float, str)
"""Types whose equal values are no change: a schedule may note its last number of steps."""


class Watched(nn.Module):
    """A base of processes and schedules, whose numbers others keep.

    Attributes:
        num_changes: How often an attribute of any of them became another, or its state was loaded.
            One count serves all: a process has others as its parts, and what is kept is quick to
            compute again.
    """

    num_changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        super().__setattr__(name, value)
        same = isinstance(value, _PLAIN) and type(before) is type(value) and before == value
        if not same and name != "training":  # the mode, which each round sets, means nothing here
            Watched.num_changes += 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        Watched.num_changes += 1
