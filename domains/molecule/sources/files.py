"""Molecules of files: QM9, structures, SMILES."""

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.sources.base import MoleculePath
from domains.molecule.sources.embedded import embedded
from domains.molecule.sources.formats import (
    Entry,
    read_arrays,
    read_qm9,
    read_sdf,
    read_smiles,
    read_uncharacterized,
    read_xyz,
)
from domains.molecule.sources.packed import Packed
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.files import stamps
from lit_rlft.kit.sources import Splits

__all__ = ["QM9", "MoleculeFile", "SmilesFile", "edm_split"]

_NUM_QM9 = 133_885
_EDM_SIZES = (100_000, 17_748, 13_083)  # train, validation, test of 130,831
_SUFFIXES = (".sdf", ".xyz", ".npz")


class QM9(MoleculePath):
    """QM9: the raw archive dsgdb9nsd.xyz.tar.bz2, the folder it unpacks to, or gdb9.sdf.

    Args:
        path: The archive, folder or .sdf file; a table `<path>.csv` beside the latter is compared
            with its titles.
        uncharacterized: QM9's list of 3,054 molecules that failed its consistency check, which
            the literature leaves out; None keeps them.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        max_atoms: Molecules with more atoms are left out.
        **source: `strict`, `only_stable` and `cache_dir` of a source.

    References:
        Quantum chemistry structures and properties of 134 kilo molecules (Ramakrishnan et al.,
        2014), https://doi.org/10.1038/sdata.2014.22
    """

    version = 2  # of SDF entries with wrong bonds

    def __init__(
        self,
        path: str,
        uncharacterized: str | None = None,
        elements: Sequence[str] = EXPLICIT,
        max_atoms: int = 29,
        **source: Any,
    ) -> None:
        super().__init__(path, elements, max_atoms, **source)
        self.uncharacterized = Path(uncharacterized) if uncharacterized else None

    def entries(self) -> Iterable[Entry]:
        left_out = self._left_out
        if self.path.suffix.lower() != ".sdf":
            return read_qm9(self.path, left_out)
        table = self.path.with_name(f"{self.path.name}.csv")
        entries = read_sdf(self.path, table if table.is_file() else None)
        return (
            entry
            for entry in entries
            if isinstance(entry, BadEntry) or entry.number not in left_out
        )

    @cached_property
    def _left_out(self) -> frozenset[int]:
        """Numbers of the uncharacterized molecules, where their list is given."""
        return (
            frozenset()
            if self.uncharacterized is None
            else read_uncharacterized(self.uncharacterized)
        )

    def splits(self, packed: Packed) -> Splits:
        return edm_split(packed.numbers, self._left_out)

    def settings(self) -> list[Any]:
        table = self.path.with_name(f"{self.path.name}.csv")
        files = [file for file in (self.uncharacterized, table) if file and file.is_file()]
        return [*super().settings(), str(self.uncharacterized), stamps(files)]


class MoleculeFile(MoleculePath):
    """A .sdf or .xyz file, or an .npz file of arrays (`read_arrays` says which).

    Args:
        path: The file.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        max_atoms: Molecules with more atoms are left out.
        **source: `strict`, `only_stable` and `cache_dir` of a source.
    """

    version = 4  # of SDF entries with wrong bonds, n_atoms, byte order marks, columns, lone atoms

    def __init__(
        self,
        path: str,
        elements: Sequence[str] = EXPLICIT,
        max_atoms: int = 29,
        **source: Any,
    ) -> None:
        super().__init__(path, elements, max_atoms, **source)
        if self.path.suffix.lower() not in _SUFFIXES:
            raise UsageError(
                f"{path} ends in none of {list(_SUFFIXES)}; use SmilesFile for SMILES and QM9 for "
                "its archive"
            )

    def entries(self) -> Iterable[Entry]:
        readers = {".sdf": read_sdf, ".xyz": read_xyz, ".npz": read_arrays}
        return readers[self.path.suffix.lower()](self.path)


class SmilesFile(MoleculePath):
    """SMILES, one a line or in a column of a .csv file, embedded by ETKDGv3 and MMFF94.

    Args:
        path: The file.
        column: Name of the SMILES' column in a .csv file.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        max_atoms: Molecules with more atoms are left out.
        only_stable: Leave out molecules that are not stable by the bond tables, which are made for
            other geometries than a force field's: about one in eleven of QM9. Also those that the
            tables read as another molecule than the SMILES: without hydrogens benzene is
            cyclohexane to them. Molecules with formal charges are not compared.
        charged: Keep molecules with formal charges, which the bond tables do not know.
        num_workers: Worker processes that embed; 0 works in this one.
        **source: `strict` and `cache_dir` of a source.
    """

    version = 2  # of SMILES of several parts, of bonds read as another molecule's, of ions

    def __init__(
        self,
        path: str,
        column: str = "smiles",
        elements: Sequence[str] = EXPLICIT,
        max_atoms: int = 29,
        only_stable: bool = True,
        charged: bool = False,
        num_workers: int = 0,
        **source: Any,
    ) -> None:
        super().__init__(path, elements, max_atoms, only_stable=only_stable, **source)
        at_least(0, self, num_workers=num_workers)
        self.column, self.charged, self.num_workers = column, charged, num_workers

    def entries(self) -> Iterable[Entry]:
        lines = list(read_smiles(self.path, self.column))
        return embedded(lines, self.elements, self.max_atoms, self.charged, self.num_workers)

    def settings(self) -> list[Any]:
        return [*super().settings(), self.column, self.charged]


def edm_split(numbers: NDArray[np.int32], left_out: Collection[int] = ()) -> Splits:
    """Return the rows of EDM's split of QM9: a permutation of the molecules in QM9's order.

    Of the 130,831 molecules that are left without the uncharacterized ones 100,000 train, 17,748
    validate and 13,083 test. A molecule's split depends on its number alone, not on which others
    are there: filters move none from one split to another. Without the list of the uncharacterized
    all 133,885 are split in the same proportion, which is another permutation.

    Args:
        numbers: [n] number of each molecule in QM9, from 1.
        left_out: Numbers of the uncharacterized molecules.

    Raises:
        UsageError: A number is none of QM9's.
    """
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= _NUM_QM9:
        raise UsageError(
            f"QM9 numbers its molecules from 1 to {_NUM_QM9}, but the file has {numbers.min()} to "
            f"{numbers.max()}; read it as a MoleculeFile"
        )
    known = np.setdiff1d(np.arange(1, _NUM_QM9 + 1), np.fromiter(left_out, np.int64))
    total, num_test = len(known), int(0.1 * len(known))
    num_train = min(_EDM_SIZES[0], round(_EDM_SIZES[0] / sum(_EDM_SIZES) * total))
    permuted = known[np.random.RandomState(0).permutation(total)]
    row_of = np.full(_NUM_QM9 + 1, -1)
    row_of[numbers] = np.arange(len(numbers))
    rows = (row_of[part] for part in np.split(permuted, [num_train, total - num_test]))
    train, val, test = (part[part >= 0] for part in rows)
    return {"train": train, "val": val, "test": test}
