"""Decoded samples that are more than one tensor: selecting, moving, checking."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition

__all__ = ["Samples", "check_samples"]


class Samples(ABC):
    """B samples; a dataclass whose tensors all have the batch on dimension 0.

    Attributes:
        noun: What the samples are called in messages.
    """

    noun: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """Return B."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self._tensors().values())).device

    def index(self, rows: Tensor | slice) -> Self:
        """Select samples."""
        return self._mapped(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """Move the samples."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)  # type: ignore[type-var]

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


S = TypeVar("S", bound=Samples)


def check_samples(samples: Any, condition: Condition, kind: type[S]) -> S:
    """Return samples of a kind, as they are.

    Raises:
        UsageError: They are something else, or not one per condition.
    """
    if not isinstance(samples, kind):
        raise UsageError(
            f"this reward takes {kind.noun}, got {type(samples).__name__}; choose a reward of the "
            "pipeline's own domain"
        )
    if len(samples) != len(condition):
        raise UsageError(
            f"{len(samples)} {kind.noun} were given for {len(condition)} conditions; a reward "
            "needs one per condition"
        )
    return samples
