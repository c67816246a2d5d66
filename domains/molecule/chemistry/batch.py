"""RDKit's view of a batch of molecules, made once and shared by all rewards and metrics."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cached_property
from hashlib import blake2b
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from torch import Tensor

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.descriptors import DESCRIPTORS
from domains.molecule.chemistry.geometry import electronic_of, strain_of
from domains.molecule.chemistry.graphs import Graphs, graphs_of
from domains.molecule.chemistry.smiles import to_smiles
from domains.molecule.chemistry.workers import in_workers
from domains.molecule.samples import Molecules

__all__ = ["INVALID", "Chemistry", "chemistry_of", "keys", "sample_facts"]

INVALID = ""
"""Key of a molecule that RDKit refuses: all of these are one class."""

_NUM_KEPT = 8  # batches whose view is kept


class Chemistry:
    """Bond orders, stability and RDKit's view of B molecules, each computed when first needed.

    Use `chemistry_of`: it returns the same view for the same batch.

    Args:
        molecules: B molecules on any device, with or without a graph.

    Attributes:
        molecules: The molecules, on the CPU and without a graph.
        orders: int8 [B, N, N] bond orders.
    """

    def __init__(self, molecules: Molecules) -> None:
        self.molecules = molecules.detach().to("cpu")
        self.orders: Tensor = bonds.bond_orders(self.molecules)
        self._values: dict[str, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        """Return B."""
        return len(self.molecules)

    @cached_property
    def atom_stability(self) -> Tensor:
        """Which atoms are stable, bool [B, N]."""
        return bonds.atom_stability(self.molecules, self.orders)

    @cached_property
    def molecule_stability(self) -> Tensor:
        """Which molecules are stable, bool [B]."""
        return bonds.molecule_stability(self.molecules, self.orders)

    @cached_property
    def graphs(self) -> Graphs:
        """The bonds as arrays."""
        return graphs_of(self.molecules, self.orders)

    @cached_property
    def mols(self) -> list[Chem.Mol | None]:
        """Sanitised molecules, all fragments, hydrogens counted on heavy atoms; None if invalid.

        One with an atom whose position is not finite is invalid.
        """
        molecules = self.molecules
        placed = molecules.positions.isfinite().all(dim=2) | ~molecules.valid
        mols = zip(self.graphs.compact(), placed.all(dim=1).tolist(), strict=True)
        return [mol if whole else None for mol, whole in mols]

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Which molecules RDKit sanitises, all of whose positions are finite, [B]."""
        return np.array([mol is not None for mol in self.mols], bool)

    @cached_property
    def fragments(self) -> list[tuple[Chem.Mol, ...]]:
        """Connected parts of each valid molecule; none of an invalid one."""
        return [_fragments(mol) for mol in self.mols]

    @cached_property
    def num_fragments(self) -> NDArray[np.int64]:
        """Number of connected parts, 0 of an invalid molecule, [B]."""
        return np.array([len(parts) for parts in self.fragments], np.int64)

    @property
    def connected(self) -> NDArray[np.bool_]:
        """Which molecules are valid and in one part, [B]."""
        return self.num_fragments == 1

    @cached_property
    def smiles(self) -> list[str | None]:
        """Canonical SMILES of the largest part, without stereochemistry; None if invalid."""
        return [to_smiles(max(parts, key=_size)) if parts else None for parts in self.fragments]

    def values(self, name: str) -> NDArray[np.float64]:
        """Return a descriptor of each molecule, [B]; NaN unless it is valid and in one part.

        Args:
            name: One of `DESCRIPTORS`.
        """
        return self.computed(name, DESCRIPTORS[name])

    def computed(self, name: str, function: Callable[[Chem.Mol], float]) -> NDArray[np.float64]:
        """Return a function of each molecule, [B]; NaN unless it is valid and in one part.

        Args:
            name: Under which the numbers are kept.
            function: Takes a sanitised molecule.
        """
        return self._filled(
            name, lambda rows: [(function(self.fragments[row][0]),) for row in rows]
        )[:, 0]

    def strain(self, num_workers: int = 0) -> NDArray[np.float64]:
        """Return the MMFF94 energy before minus after minimisation in kcal/mol, [B].

        NaN unless the molecule is valid, in one part and no radical, and the force field knows its
        atoms.
        Hydrogens that are implicit are placed and minimised before.

        Args:
            num_workers: Worker processes; 0 works in this one.
        """

        def work(rows: list[int]) -> list[tuple[float, ...]]:
            mols = [self.graphs.full(row) for row in rows]
            return [(value,) for value in in_workers(strain_of, mols, num_workers)]

        return self._filled("strain", work)[:, 0]

    def electronic(self, num_workers: int = 0) -> NDArray[np.float64]:
        """Return the dipole moment in Debye and the HOMO-LUMO gap in eV by GFN2-xTB, [B, 2].

        NaN unless the molecule is valid and in one part and the calculation converges.

        Args:
            num_workers: Worker processes; 0 works in this one.
        """

        def work(rows: list[int]) -> list[tuple[float, ...]]:
            mols = [self.graphs.full(row) for row in rows]
            return list(in_workers(electronic_of, mols, num_workers))

        return self._filled("electronic", work, num_columns=2)

    def _filled(
        self,
        name: str,
        function: Callable[[list[int]], list[tuple[float, ...]]],
        num_columns: int = 1,
    ) -> NDArray[np.float64]:
        """Return a function of the valid and connected molecules' places, NaN elsewhere, [B, K]."""
        if name not in self._values:
            values = np.full((len(self), num_columns), np.nan)
            rows = self.connected.nonzero()[0].tolist()
            if rows:
                values[rows] = function(rows)
            self._values[name] = values
        return self._values[name]


def chemistry_of(molecules: Molecules) -> Chemistry:
    """Return the view of a batch; one of the last few batches gets the view made before."""
    key = _fingerprint(molecules)
    with _LOCK:
        view = _VIEWS.pop(key, None) or Chemistry(molecules)
        _VIEWS[key] = view
        while len(_VIEWS) > _NUM_KEPT:
            _VIEWS.popitem(last=False)
    return view


def keys(molecules: Molecules) -> list[Hashable]:
    """Return each molecule's class for de-duplication: its canonical SMILES, or `INVALID`."""
    return [smiles or INVALID for smiles in chemistry_of(molecules).smiles]


def sample_facts(molecules: Molecules) -> list[dict[str, Any]]:
    """Return of each molecule `smiles`, canonical, of its largest part; None of an invalid one.

    Besides `num_fragments`, and `stable` where hydrogens are atoms.
    """
    chemistry = chemistry_of(molecules)
    facts = [
        {"smiles": smiles, "num_fragments": parts}
        for smiles, parts in zip(chemistry.smiles, chemistry.num_fragments.tolist(), strict=True)
    ]
    if molecules.implicit_hydrogens:
        return facts
    stable = chemistry.molecule_stability.tolist()
    return [fact | {"stable": each} for fact, each in zip(facts, stable, strict=True)]


_VIEWS: OrderedDict[bytes, Chemistry] = OrderedDict()
_LOCK = Lock()


def _fingerprint(molecules: Molecules) -> bytes:
    """Return a hash of all that the view depends on."""
    digest = blake2b(repr((molecules.elements, molecules.implicit_hydrogens)).encode())
    positions = molecules.positions.detach().to("cpu", torch.float32).contiguous()
    types = molecules.types.to("cpu").contiguous()
    digest.update(repr(tuple(types.shape)).encode())
    for tensor in (positions, types):
        digest.update(tensor.numpy().tobytes())
    return digest.digest()


def _fragments(mol: Chem.Mol | None) -> tuple[Chem.Mol, ...]:
    if mol is None:
        return ()
    # Most are in one part, and copies cost.
    if len(Chem.GetMolFrags(mol)) == 1:
        return (mol,)
    return tuple(Chem.GetMolFrags(mol, asMols=True))


def _size(mol: Chem.Mol) -> int:
    return mol.GetNumAtoms(onlyExplicit=False)
