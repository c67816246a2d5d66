"""The domain's samples: B molecules with N slots for atoms each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.samples import Samples, check_samples

__all__ = ["EMPTY", "Molecules", "check_molecules"]

EMPTY = -1
"""Type of a slot without an atom."""


@dataclass(frozen=True, eq=False)
class Molecules(Samples):
    """B molecules.

    Attributes:
        positions: [B, N, 3] in Angstrom; anything where the slot is empty.
        types: [B, N] int64, numbers in `elements`, or `EMPTY`.
        probabilities: [B, N, len(elements)] in [0, 1], how much of each element an atom is, with
            gradient where the model's decision is soft, one-hot otherwise; 0 in empty slots.
        elements: Symbols of the types, e.g. ("H", "C", "N", "O", "F").
        implicit_hydrogens: Whether atoms are heavy atoms only, hydrogens filled in by valence.
    """

    noun: ClassVar[str] = "molecules"

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

    def detach(self) -> "Molecules":
        """Return the same molecules without a graph, every atom of one element."""
        positions = self.positions.detach()
        return Molecules.of(positions, self.types, self.elements, self.implicit_hydrogens)


def check_molecules(samples: Any, condition: Condition) -> Molecules:
    """Return samples that are molecules, as they are.

    Raises:
        UsageError: They are something else, or not one per condition.
    """
    return check_samples(samples, condition, Molecules)
