"""Structures as files have them: checked, counted and packed into arrays."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.elements import ATOMIC_NUMBERS, VALENCES
from domains.molecule.samples import EMPTY, Molecules
from lit_rlft.kit.bad_entries import BadEntry, Report, usable

__all__ = ["Packed", "Structure", "known_smiles", "molecules_of", "pack"]

_CHUNK = 4096  # molecules
_ENOUGH = 10  # molecules that tell of a file's units
_FEW = 0.5  # share of stable molecules of a file whose units are doubtful
_MISREAD = "bonds that are read as another molecule's"


@dataclass(frozen=True)
class Structure:
    """One entry of a file.

    Attributes:
        name: Where it is, e.g. "line 17".
        number: Its number in the file.
        symbols: [n] elements, hydrogens among them.
        positions: [n, 3] in Angstrom.
        num_missing: Hydrogens that the file's bonds call for and that are not among the atoms.
        charge: Sum of the formal charges.
        smiles: The canonical SMILES of the molecule meant, where it is known and its bonds shall be
            read as that.
    """

    name: str
    number: int
    symbols: Sequence[str]
    positions: NDArray[np.floating]
    num_missing: int = 0
    charge: int = 0
    smiles: str = ""


@dataclass(frozen=True)
class Packed:
    """n molecules of at most N atoms, empty slots last.

    Attributes:
        positions: float32 [n, N, 3] in Angstrom, their mean over each molecule's atoms 0.
        types: int8 [n, N], `EMPTY` where there is no atom.
        numbers: int32 [n] number of each in its file.
    """

    positions: NDArray[np.float32]
    types: NDArray[np.int8]
    numbers: NDArray[np.int32]

    def __len__(self) -> int:
        """Return n."""
        return len(self.types)

    @property
    def num_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each, [n]."""
        return (self.types != EMPTY).sum(axis=1)

    def index(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "Packed":
        """Select molecules."""
        return Packed(self.positions[rows], self.types[rows], self.numbers[rows])


def pack(
    entries: Iterable[Structure | BadEntry],
    elements: Sequence[str],
    max_atoms: int,
    *,
    source: str,
    strict: bool = False,
    only_stable: bool = False,
) -> tuple[Packed, Report]:
    """Check entries and pack the good ones; hydrogens are left out unless among the elements.

    Args:
        entries: Structures, or what is wrong with an entry that could not be read.
        elements: Symbols of the types.
        max_atoms: N.
        source: The file, for messages.
        strict: Stop at the first bad entry instead of leaving it out.
        only_stable: Leave out molecules with an atom whose bonds, by the tables, are not its
            valence; with implicit hydrogens, exceed it. Also those whose bonds, by the tables, are
            those of another molecule than the structure's `smiles`, where it has any.

    Raises:
        UsageError: An entry is bad and `strict`, or no entry is good.
    """
    report = Report(source, "molecules", strict, remedies=_remedies(elements, max_atoms))
    types_of = {symbol: i for i, symbol in enumerate(elements)}
    # Flat arrays: Python objects per molecule would take several times their memory.
    positions, types, numbers = array("f"), array("b"), array("i")
    names, meant = list[str](), list[str]()
    for entry in usable(entries, lambda entry: _fault(entry, types_of, max_atoms), report):
        _append(entry, types_of, max_atoms, positions, types)
        numbers.append(entry.number)
        names.append(entry.name)
        meant.append(entry.smiles)
    packed = Packed(
        np.frombuffer(positions, np.float32).reshape(-1, max_atoms, 3),
        np.frombuffer(types, np.int8).reshape(-1, max_atoms),
        np.frombuffer(numbers, np.int32),
    )
    if only_stable and len(packed):
        faults = _bond_faults(packed, tuple(elements), meant)
        for name, fault in zip(names, faults, strict=True):
            if fault:
                report.leave_out(BadEntry(name, *fault))
        packed = packed.index(np.array([not fault for fault in faults]))
    else:
        report.notes += _doubts(packed, elements)
    report.num_kept = len(packed)
    report.check()
    return packed, report


def _doubts(packed: Packed, elements: Sequence[str]) -> list[str]:
    """Return what suggests other units, or missing hydrogens; of the first molecules."""
    few = packed.index(np.arange(min(len(packed), _CHUNK)))
    if "H" not in elements or len(few) < _ENOUGH:
        return []
    share = float(_stability(few, tuple(elements))[0].mean())
    if share >= _FEW:
        return []
    return [
        f"of these {1 - share:.0%} have bonds that are not their valences: are positions in "
        "Angstrom, and all hydrogens there?"
    ]


def _remedies(elements: Sequence[str], max_atoms: int) -> dict[str, str]:
    """Return what to do about kinds of faults."""
    return {
        f"elements other than {', '.join(elements)}": _of_elements(elements),
        f"more atoms than {max_atoms}": "raise max_atoms",
        "missing hydrogens": "add hydrogens, or set elements to heavy atoms alone",
        "more than one part": "write each part on a line of its own",
        "no conformer": "embed the molecules, as SmilesFile does",
        "bonds that are not its valences": "set only_stable to false",
        "bonds beyond a valence": "set only_stable to false",
        _MISREAD: "set only_stable to false",
    }


def _of_elements(elements: Sequence[str]) -> str:
    """Return what to do about other elements: the bond tables know no more than theirs."""
    if set(VALENCES) <= set(elements):
        return f"no others than {', '.join(VALENCES)} are known here"
    return f"name them in elements, which may be {', '.join(VALENCES)}"


def molecules_of(
    packed: Packed, elements: Sequence[str], rows: slice | NDArray[np.int64] = slice(None)
) -> Molecules:
    """Return packed molecules as samples; hydrogens are implicit unless among the elements."""
    positions = torch.from_numpy(np.array(packed.positions[rows]))
    types = torch.from_numpy(packed.types[rows].astype(np.int64))
    return Molecules.of(positions, types, elements, "H" not in elements)


def known_smiles(packed: Packed, elements: tuple[str, ...]) -> frozenset[str]:
    """Return canonical SMILES of packed molecules, made from positions as those of samples are."""
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(packed), _CHUNK)]
    found = (Chemistry(molecules_of(packed, elements, rows)).smiles for rows in chunks)
    return frozenset(smiles for part in found for smiles in part if smiles is not None)


def _fault(entry: Structure, types_of: dict[str, int], max_atoms: int) -> BadEntry | None:
    """Return what is wrong with a structure, or None."""
    unknown = sorted(set(entry.symbols) - set(types_of) - {"H"})
    if unknown:
        kind = f"elements other than {', '.join(types_of)}"
        return BadEntry(entry.name, kind, ", ".join(unknown))
    count = sum(symbol in types_of for symbol in entry.symbols)
    if not count:
        return BadEntry(entry.name, "no atoms")
    if count > max_atoms:
        return BadEntry(entry.name, f"more atoms than {max_atoms}", f"{count} atoms")
    if "H" in types_of and entry.num_missing:
        return BadEntry(entry.name, "missing hydrogens", f"{entry.num_missing} of them")
    if not np.isfinite(entry.positions).all():
        atom = int((~np.isfinite(entry.positions).all(axis=1)).argmax())
        detail = f"atom {atom + 1}: {entry.symbols[atom]} at {entry.positions[atom].tolist()}"
        return BadEntry(entry.name, "a position that is not finite", detail)
    if len(entry.symbols) > 1 and np.ptp(entry.positions, axis=0).max() < 1e-3:
        return BadEntry(entry.name, "no conformer", "all atoms are in one place")
    num_electrons = sum(ATOMIC_NUMBERS[symbol] for symbol in entry.symbols) - entry.charge
    if "H" in types_of and num_electrons % 2:
        return BadEntry(entry.name, "an odd number of electrons", "a radical or an ion")
    return None


def _append(
    entry: Structure,
    types_of: dict[str, int],
    max_atoms: int,
    positions: "array[float]",
    types: "array[int]",
) -> None:
    kept = [i for i, symbol in enumerate(entry.symbols) if symbol in types_of]
    places = np.asarray(entry.positions, np.float64)[kept]
    places = places - places.mean(axis=0)
    num_empty = max_atoms - len(kept)
    positions.extend(places.ravel().tolist())
    positions.extend([0.0] * 3 * num_empty)
    types.extend(types_of[entry.symbols[i]] for i in kept)
    types.extend([EMPTY] * num_empty)


def _bond_faults(
    packed: Packed, elements: tuple[str, ...], meant: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return what is wrong with each molecule's bonds by the tables; nothing where nothing is.

    Args:
        packed: n molecules.
        elements: Symbols of the types.
        meant: [n] SMILES that they shall have; "" for any.
    """
    stable, fault = _stability(packed, elements)
    faults: list[tuple[str, ...]] = [() if right else (fault,) for right in stable.tolist()]
    known = np.flatnonzero(stable & np.array([bool(smiles) for smiles in meant]))
    for start in range(0, len(known), _CHUNK):
        rows = known[start : start + _CHUNK]
        found = Chemistry(molecules_of(packed, elements, rows)).smiles
        for row, smiles in zip(rows.tolist(), found, strict=True):
            if smiles != meant[row]:
                faults[row] = (_MISREAD, f"{meant[row]} as {smiles}")
    return faults


def _stability(packed: Packed, elements: tuple[str, ...]) -> tuple[NDArray[np.bool_], str]:
    """Return which molecules are stable by the bond tables, [n], and what is wrong with others."""
    explicit = "H" in elements
    test = bonds.molecule_stability if explicit else bonds.fitting_valences
    starts = range(0, len(packed), _CHUNK)
    parts = [test(molecules_of(packed, elements, slice(i, i + _CHUNK))) for i in starts]
    fault = "bonds that are not its valences" if explicit else "bonds beyond a valence"
    return torch.cat(parts).numpy(), fault
