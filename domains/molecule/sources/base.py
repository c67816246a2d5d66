"""Where molecules come from: the enumerated set, QM9, and files of one's own."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from domains.molecule import EMBEDDED
from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.elements import EXPLICIT, check_elements
from domains.molecule.chemistry.geometry import embed
from domains.molecule.chemistry.workers import in_processes
from domains.molecule.samples import EMPTY
from domains.molecule.sources import enumeration
from domains.molecule.sources.formats import (
    Entry,
    read_arrays,
    read_qm9,
    read_sdf,
    read_smiles,
    read_uncharacterized,
    read_xyz,
)
from domains.molecule.sources.packed import Packed, Structure, molecules_of, pack
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.cache import cached_folder, open_arrays, save_arrays, user_cache

__all__ = ["QM9", "Enumerated", "MoleculeFile", "SmilesFile", "Source", "Splits", "edm_split"]

Splits = dict[str, NDArray[np.int64]]
"""Rows of "train", "val" and "test"."""

ASSET = EMBEDDED / "enumerated.safetensors"
"""The enumerated molecules of the default settings."""

_VERSION = 1  # of the cached arrays
_STEP = 2e-4  # Angstrom
_NUM_QM9 = 133_885
_EDM_SIZES = (100_000, 17_748, 13_083)  # train, validation, test of 130,831
_SUFFIXES = (".sdf", ".xyz", ".npz")


class Source(ABC):
    """A collection of molecules, kept as memory-mapped arrays once they were made.

    Attributes:
        elements: Symbols of the types.
        max_atoms: Most atoms that a molecule has; those with more are left out.
    """

    def __init__(
        self,
        elements: Sequence[str],
        max_atoms: int,
        *,
        strict: bool = False,
        only_stable: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            elements: Symbols of the types; without "H" only heavy atoms are kept.
            max_atoms: Molecules with more atoms are left out.
            strict: Stop at the first molecule that cannot be used instead of leaving it out.
            only_stable: Leave out molecules that are not stable by the bond tables.
            cache_dir: Folder of the arrays; None takes `lit-rlft` in the user's cache folder.
        """
        if max_atoms < 1:
            raise UsageError(f"max_atoms must be at least 1, got {max_atoms}")
        self.elements, self.max_atoms = check_elements(elements), max_atoms
        self.strict, self.only_stable = strict, only_stable
        self.cache_dir = user_cache("molecule", cache_dir)

    @property
    def implicit_hydrogens(self) -> bool:
        """Whether only heavy atoms are kept."""
        return "H" not in self.elements

    @property
    @abstractmethod
    def label(self) -> str:
        """What the molecules are called in messages."""

    @abstractmethod
    def entries(self) -> Iterable[Entry]:
        """Iterate over the molecules, or what is wrong with them."""

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return all that the molecules depend on besides elements, max_atoms and filters."""

    def splits(self, packed: Packed) -> Splits | None:
        """Return the rows of the standard splits, or None where there are none."""
        return None

    def load(self) -> Packed:
        """Return the molecules.

        Raises:
            UsageError: There are none, or one is bad where none may be.
        """
        folder = cached_folder(self.cache_dir / self._key(), self._fill)
        return Packed(*open_arrays(folder, ("positions", "types", "numbers")))

    def _fill(self, folder: Path) -> None:
        """Make the arrays in a folder."""
        packed, report = pack(
            self.entries(),
            self.elements,
            self.max_atoms,
            source=self.label,
            strict=self.strict,
            only_stable=self.only_stable,
        )
        save_arrays(folder, self.cache_dir / self._key(), vars(packed), report)

    def _key(self) -> str:
        """Name the arrays by all that they depend on."""
        stem = re.sub(r"\W+", "-", Path(self.label).stem)
        return f"{stem}-{self.digest()}"

    def digest(self) -> str:
        """Return a hash of all that the molecules depend on."""
        own = [type(self).__name__, self.elements, self.max_atoms, self.strict, self.only_stable]
        text = json.dumps([_VERSION, *own, *self.settings()])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Enumerated(Source):
    """Small molecules grown at random under valence, embedded, stable by the bond tables.

    Molecules are drawn until a number of attempts is used up, and each is kept once: with few
    heavy atoms nearly all that the rules allow. They depend on the settings alone.

    Args:
        max_heavy: Most heavy atoms.
        num_attempts: Molecules grown, before those that occurred and are rejected are left out.
        seed: Seed of the growth.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        num_workers: Processes that grow and embed; 0 works in this one.
        **source: `strict` and `cache_dir` of a source.
    """

    def __init__(
        self,
        max_heavy: int = 6,
        num_attempts: int = 300_000,
        seed: int = 0,
        elements: Sequence[str] = EXPLICIT,
        num_workers: int = 0,
        **source: Any,
    ) -> None:
        if max_heavy < 1 or num_attempts < 1:
            raise UsageError(
                f"max_heavy and num_attempts must be at least 1, got {max_heavy}, {num_attempts}"
            )
        # A chain of n carbon atoms has 2 n + 2 hydrogens.
        max_atoms = 3 * max_heavy + 2 if "H" in elements else max_heavy
        super().__init__(elements, max_atoms, only_stable=True, **source)
        self.max_heavy, self.num_attempts, self.seed = max_heavy, num_attempts, seed
        self.num_workers = num_workers

    @property
    def label(self) -> str:
        return f"enumerated molecules of at most {self.max_heavy} heavy atoms"

    def entries(self) -> Iterable[Entry]:
        smiles = enumeration.enumerate_smiles(
            self.max_heavy, self.num_attempts, self.seed, self.num_workers
        )
        lines = [(f"molecule {i}", i, text) for i, text in enumerate(smiles)]
        return _embedded(lines, self.elements, self.max_atoms, False, self.num_workers)

    def settings(self) -> list[Any]:
        return [self.max_heavy, self.num_attempts, self.seed]

    def load(self) -> Packed:
        """Return the molecules: those that ship with the package where the settings are theirs."""
        if not ASSET.is_file() or not self._is_shipped():
            return super().load()
        return _unpacked(load_file(ASSET), self.max_atoms)

    def write_asset(self) -> Path:
        """Write the molecules to the file that ships with the package, rounded to 0.0002 Angstrom.

        Those that are no longer stable then are left out.

        Raises:
            UsageError: The file is there and holds the molecules of other settings.
        """
        if ASSET.is_file() and not self._is_shipped():
            raise UsageError(
                f"{ASSET} holds the molecules of other settings than these; delete it first"
            )
        made = super().load()
        arrays = _rounded(made)
        kept = bonds.molecule_stability(
            molecules_of(_unpacked(arrays, self.max_atoms), self.elements)
        )
        ASSET.parent.mkdir(exist_ok=True)
        arrays = _rounded(made.index(kept.numpy()))
        save_file(arrays, ASSET, metadata={"settings": self.digest()})
        ASSET.chmod(0o644)
        return ASSET

    def _is_shipped(self) -> bool:
        """Whether the file that ships holds the molecules of these settings."""
        with safe_open(ASSET, "np") as file:
            return (file.metadata() or {}).get("settings") == self.digest()


class _File(Source):
    """Molecules of a file or folder; see `Source` for the settings."""

    def __init__(self, path: str, elements: Sequence[str], max_atoms: int, **source: Any) -> None:
        super().__init__(elements, max_atoms, **source)
        self.path = Path(path)

    @property
    def label(self) -> str:
        return str(self.path)

    def settings(self) -> list[Any]:
        if not self.path.exists():
            raise UsageError(f"there is no {self.path}; give the file or folder of the data set")
        files = sorted(self.path.glob("*.xyz")) if self.path.is_dir() else [self.path]
        return [str(self.path.resolve()), _stamp(files)]


class QM9(_File):
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
        return [*super().settings(), str(self.uncharacterized), _stamp(files)]


class MoleculeFile(_File):
    """A .sdf or .xyz file, or an .npz file of arrays (`read_arrays` says which).

    Args:
        path: The file.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        max_atoms: Molecules with more atoms are left out.
        **source: `strict`, `only_stable` and `cache_dir` of a source.
    """

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


class SmilesFile(_File):
    """SMILES, one a line or in a column of a .csv file, embedded by ETKDGv3 and MMFF94.

    Args:
        path: The file.
        column: Name of the SMILES' column in a .csv file.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        max_atoms: Molecules with more atoms are left out.
        only_stable: Leave out molecules that are not stable by the bond tables, which are made for
            other geometries than a force field's: about one in eleven of QM9.
        charged: Keep molecules with formal charges, which the bond tables do not know.
        num_workers: Processes that embed; 0 works in this one.
        **source: `strict` and `cache_dir` of a source.
    """

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
        self.column, self.charged, self.num_workers = column, charged, num_workers

    def entries(self) -> Iterable[Entry]:
        lines = list(read_smiles(self.path, self.column))
        return _embedded(lines, self.elements, self.max_atoms, self.charged, self.num_workers)

    def settings(self) -> list[Any]:
        return [*super().settings(), self.column, self.charged]


def _rounded(packed: Packed) -> dict[str, NDArray[Any]]:
    """Return atoms one after the other: positions in steps, types, and the molecules' sizes."""
    full = packed.types != EMPTY
    steps = np.rint(packed.positions[full] / _STEP).astype(np.int16)
    sizes = packed.num_atoms.astype(np.uint8)
    types = packed.types[full].astype(np.uint8)
    return {"positions": steps, "types": types, "sizes": sizes, "numbers": packed.numbers}


def _unpacked(arrays: Mapping[str, NDArray[Any]], max_atoms: int) -> Packed:
    """Return what `_rounded` made arrays of."""
    full = np.arange(max_atoms) < arrays["sizes"][:, None]
    positions = np.zeros((*full.shape, 3), np.float32)
    positions[full] = arrays["positions"] * np.float32(_STEP)
    centres = positions.sum(axis=1, keepdims=True) / arrays["sizes"][:, None, None]
    positions -= centres.astype(np.float32) * full[..., None]
    types = np.full(full.shape, EMPTY, np.int8)
    types[full] = arrays["types"]
    return Packed(positions, types, arrays["numbers"])


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
            f"data.init_args.source: QM9 numbers its molecules from 1 to {_NUM_QM9}, but the file "
            f"has {numbers.min()} to {numbers.max()}; read it as a MoleculeFile"
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


def _embedded(
    lines: Sequence[tuple[str, int, str]],
    elements: Sequence[str],
    max_atoms: int,
    charged: bool,
    num_workers: int,
) -> Iterable[Entry]:
    """Iterate over the structures of SMILES with names and numbers."""
    allowed = frozenset(elements)
    jobs = [(smiles, allowed, max_atoms, charged) for _, _, smiles in lines]
    results = in_processes(embed, jobs, num_workers)
    for (name, number, _), result in zip(lines, results, strict=True):
        if result.positions is None:
            yield BadEntry(name, result.fault, result.detail)
        else:
            yield Structure(name, number, result.symbols, result.positions)


def _stamp(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Return age and size of files, by which a change is noticed."""
    return [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
