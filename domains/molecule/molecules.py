"""What the domain's samples are: B molecules with N slots for atoms each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition

__all__ = ["EMPTY", "Molecules", "check_molecules"]

EMPTY = -1
"""Type of a slot without an atom."""


@dataclass(frozen=True, eq=False)
class Molecules:
    """B molecules.

    Attributes:
        positions: [B, N, 3] in Angstrom; anything where the slot is empty.
        types: [B, N] int64, numbers in `elements`, or `EMPTY`.
        probabilities: [B, N, len(elements)] in [0, 1], how much of each element an atom is, with
            gradient where the model's decision is soft, one-hot otherwise; 0 in empty slots.
        elements: Symbols of the types, e.g. ("H", "C", "N", "O", "F").
        implicit_hydrogens: Whether atoms are heavy atoms only, hydrogens filled in by valence.
    """

    positions: Tensor
    types: Tensor
    probabilities: Tensor
    elements: tuple[str, ...]
    implicit_hydrogens: bool = False

    @classmethod
    def of(
        cls,
        positions: Tensor,
        types: Tensor,
        elements: Sequence[str],
        implicit_hydrogens: bool = False,
    ) -> "Molecules":
        """Return molecules whose atoms are of one element each."""
        one_hot = functional.one_hot(types.clamp(min=0), len(elements)).to(positions.dtype)
        probabilities = one_hot * (types != EMPTY).unsqueeze(-1)
        return cls(positions, types, probabilities, tuple(elements), implicit_hydrogens)

    def __len__(self) -> int:
        """Return B."""
        return self.types.shape[0]

    @property
    def valid(self) -> Tensor:
        """Which slots hold an atom, bool [B, N]."""
        return self.types != EMPTY

    @property
    def num_atoms(self) -> Tensor:
        """Number of atoms of each molecule, int64 [B]."""
        return self.valid.sum(dim=1)

    def index(self, rows: Tensor | slice) -> "Molecules":
        """Select molecules."""
        positions, types, weights = self.positions[rows], self.types[rows], self.probabilities[rows]
        return replace(self, positions=positions, types=types, probabilities=weights)

    def detach(self) -> "Molecules":
        """Return the same molecules without a graph, every atom of one element."""
        positions = self.positions.detach()
        return Molecules.of(positions, self.types, self.elements, self.implicit_hydrogens)

    def to(self, device: torch.device | str) -> "Molecules":
        """Move the molecules."""
        tensors = (self.positions, self.types, self.probabilities)
        positions, types, weights = (x.to(device) for x in tensors)
        return replace(self, positions=positions, types=types, probabilities=weights)


def check_molecules(samples: Any, condition: Condition) -> Molecules:
    """Return samples that are molecules, as they are.

    Raises:
        UsageError: They are something else, or not one per condition.
    """
    if not isinstance(samples, Molecules):
        raise UsageError(
            f"this reward takes molecules, got {type(samples).__name__}; choose a reward of the "
            "pipeline's own domain"
        )
    if len(samples) != len(condition):
        raise UsageError(
            f"{len(samples)} molecules were given for {len(condition)} conditions; a reward needs "
            "one per condition"
        )
    return samples
