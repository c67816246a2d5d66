"""Molecules to test with: RDKit geometries, diatomics and real data."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from domains.molecule.chemistry.elements import EXPLICIT, HEAVY
from domains.molecule.chemistry.geometry import embed
from domains.molecule.samples import EMPTY, Molecules
from lit_rlft.core.pipeline import Condition

DATA = Path(__file__).parents[3] / ".." / "shared/data/molecules"


def real(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not here")
    return DATA / name


def conditions(num: int) -> Condition:
    return Condition([{"num_atoms": 1}], {}, torch.zeros(num, dtype=torch.int64))


@cache
def geometry(smiles: str) -> tuple[tuple[str, ...], np.ndarray]:
    made = embed((smiles, frozenset(EXPLICIT), 99, True))
    assert made.positions is not None, made.fault
    return made.symbols, made.positions


def from_smiles(*all_smiles: str, heavy: bool = False) -> Molecules:
    """Return molecules with hydrogens (heavy: without) at geometries of ETKDG and MMFF94."""
    return from_atoms([geometry(smiles) for smiles in all_smiles], heavy=heavy)


def from_atoms(all_atoms: list, heavy: bool = False) -> Molecules:
    """Return molecules of (symbols, positions), padded to the largest."""
    elements = HEAVY if heavy else EXPLICIT
    kept = [
        [(s, p) for s, p in zip(symbols, places, strict=True) if s in elements]
        for symbols, places in all_atoms
    ]
    size = max(map(len, kept))
    positions = torch.full((len(kept), size, 3), 7.0)
    types = torch.full((len(kept), size), EMPTY)
    for row, atoms in enumerate(kept):
        for slot, (symbol, place) in enumerate(atoms):
            positions[row, slot] = torch.as_tensor(np.asarray(place, np.float32))
            types[row, slot] = elements.index(symbol)
    return Molecules.of(positions, types, elements, heavy)


def pair(first: str, second: str, distance: float) -> Molecules:
    return from_atoms([((first, second), [(0.3, -0.2, 0.1), (0.3 + distance, -0.2, 0.1)])])
