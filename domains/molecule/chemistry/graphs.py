"""RDKit molecules from bond orders, without charges, hydrogens counted on their neighbours."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from torch import Tensor

from domains.molecule.chemistry.elements import ATOMIC_NUMBERS
from domains.molecule.chemistry.smiles import to_smiles
from domains.molecule.samples import EMPTY, Molecules

__all__ = ["BOND_TYPES", "Graphs", "graphs_of", "to_smiles"]

BOND_TYPES = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
"""RDKit's types by bond order."""


@dataclass(frozen=True)
class Graphs:
    """The bonds of B molecules as arrays, from which RDKit molecules are made.

    Attributes:
        symbols: Symbols of the types.
        types: int64 [B, N], `EMPTY` where there is no atom.
        orders: int8 [B, N, N].
        positions: float64 [B, N, 3] in Angstrom.
        implicit_hydrogens: Whether RDKit fills valences with hydrogens.
    """

    symbols: tuple[str, ...]
    types: NDArray[np.int64]
    orders: NDArray[np.int8]
    positions: NDArray[np.float64]
    implicit_hydrogens: bool

    def compact(self) -> list[Chem.Mol | None]:
        """Return sanitised molecules, hydrogens counted on heavy atoms; None where invalid.

        A hydrogen with one bond, to a heavy atom, becomes a number of that atom; others stay atoms.
        Where hydrogens are explicit none is added: an atom with too few bonds is a radical.
        """
        folded = self._folded()
        counts = np.where(folded[:, None, :], self.orders, 0).sum(axis=2)
        kept = (self.types != EMPTY) & ~folded
        atoms = self._prototypes()
        return [_sanitised(mol) for mol in self._assemble(kept, counts, atoms)]

    def full(self, row: int) -> Chem.Mol:
        """Return one molecule with an RDKit atom per atom, in their order, and its positions.

        It is not sanitised. Implicit hydrogens are left out.
        """
        kept = self.types != EMPTY
        part = Graphs(
            self.symbols,
            self.types[row : row + 1],
            self.orders[row : row + 1],
            self.positions[row : row + 1],
            self.implicit_hydrogens,
        )
        counts = np.zeros_like(part.types)
        (mol,) = part._assemble(kept[row : row + 1], counts, self._prototypes())
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(np.ascontiguousarray(self.positions[row, kept[row]]))
        mol.AddConformer(conformer)
        return mol.GetMol()

    def _folded(self) -> NDArray[np.bool_]:
        """Return which atoms are hydrogens with one bond, to a heavy atom, [B, N]."""
        if "H" not in self.symbols:
            return np.zeros(self.types.shape, bool)
        hydrogen = self.types == self.symbols.index("H")
        heavy = (self.types != EMPTY) & ~hydrogen
        bonded = self.orders > 0
        to_heavy = (bonded & heavy[:, None, :]).sum(axis=2)
        return hydrogen & (bonded.sum(axis=2) == 1) & (to_heavy == 1)

    def _prototypes(self) -> dict[tuple[int, int], Chem.Atom]:
        """Return an RDKit atom for each type and each number of folded hydrogens."""
        atoms = {}
        for number, symbol in enumerate(self.symbols):
            for count in range(self.types.shape[1] + 1):
                atom = Chem.Atom(ATOMIC_NUMBERS[symbol])
                if not self.implicit_hydrogens:
                    atom.SetNoImplicit(True)
                    atom.SetNumExplicitHs(count)
                atoms[number, count] = atom
        return atoms

    def _assemble(
        self,
        kept: NDArray[np.bool_],
        counts: NDArray[np.int64],
        atoms: dict[tuple[int, int], Chem.Atom],
    ) -> list[Chem.RWMol]:
        places = kept.cumsum(axis=1) - 1
        bonded = np.triu(self.orders, k=1) * (kept[:, :, None] & kept[:, None, :])
        rows, first, second = bonded.nonzero()
        starts = np.searchsorted(rows, np.arange(len(kept) + 1)).tolist()
        bonds = [
            places[rows, first].tolist(),
            places[rows, second].tolist(),
            self.orders[rows, first, second].tolist(),
        ]
        types, numbers = self.types[kept].tolist(), counts[kept].tolist()
        ends = [0, *kept.sum(axis=1).cumsum().tolist()]
        mols = []
        for row in range(len(kept)):
            mol = Chem.RWMol()
            for key in zip(
                types[ends[row] : ends[row + 1]], numbers[ends[row] : ends[row + 1]], strict=True
            ):
                mol.AddAtom(atoms[key])
            for i in range(starts[row], starts[row + 1]):
                mol.AddBond(bonds[0][i], bonds[1][i], BOND_TYPES[bonds[2][i]])
            mols.append(mol)
        return mols


def graphs_of(molecules: Molecules, orders: Tensor) -> Graphs:
    """Return the arrays of B molecules with their bond orders [B, N, N]."""
    return Graphs(
        molecules.elements,
        molecules.types.cpu().numpy(),
        orders.cpu().numpy(),
        molecules.positions.detach().to("cpu", torch.float64).numpy(),
        molecules.implicit_hydrogens,
    )


def _sanitised(mol: Chem.RWMol) -> Chem.RWMol | None:
    failed = Chem.SanitizeMol(mol, catchErrors=True)
    return mol if not failed and mol.GetNumAtoms() else None
