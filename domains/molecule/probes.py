"""Molecules that have nothing in common, placed by RDKit: a reward that reads them differs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from domains.molecule.chemistry.geometry import embed
from domains.molecule.samples import EMPTY, Molecules

__all__ = ["probe_molecules"]

_SMILES = ("C", "CO", "O1C=CC=C1", "FC(F)F", "CC#N", "N", "O", "CC", "C=C")
"""The first of these that a model can draw, as many as are asked for."""
_MOST = 9  # atoms, hydrogens among them


def probe_molecules(
    elements: Sequence[str], num_slots: int, *, implicit_hydrogens: bool, most: int = 4
) -> Molecules | None:
    """Return molecules at geometries of ETKDGv3 and MMFF94, the same ones in every run.

    Args:
        elements: The model's.
        num_slots: The most atoms that it has.
        implicit_hydrogens: Whether its atoms are heavy atoms only.
        most: How many molecules, if it can draw so many.

    Returns:
        At least two molecules; None where it can draw fewer.
    """
    known = frozenset(elements) | (frozenset("H") if implicit_hydrogens else frozenset())
    positions: list[Tensor] = []
    types: list[Tensor] = []
    for smiles in _SMILES:
        made = embed((smiles, known, _MOST, False))
        if made.positions is None or len(types) == most:
            continue
        kept = [i for i, symbol in enumerate(made.symbols) if symbol in elements]
        if len(kept) > num_slots:
            continue
        slots = torch.full((num_slots,), EMPTY)
        slots[: len(kept)] = torch.tensor([elements.index(made.symbols[i]) for i in kept])
        places = torch.zeros(num_slots, 3)
        places[: len(kept)] = torch.from_numpy(made.positions[kept])
        types.append(slots)
        positions.append(places)
    if len(types) < 2:
        return None
    return Molecules.of(torch.stack(positions), torch.stack(types), elements, implicit_hydrogens)
