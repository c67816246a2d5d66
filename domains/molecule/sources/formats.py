"""Readers of molecule files: each yields the structures of a format, or what is wrong with one."""

import csv
import math
import re
import tarfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.elements import EXPLICIT, SYMBOLS
from domains.molecule.samples import Molecules
from domains.molecule.sources.packed import Structure
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.files import encoding, existing, listed, reason

__all__ = [
    "read_arrays",
    "read_qm9",
    "read_sdf",
    "read_smiles",
    "read_uncharacterized",
    "read_xyz",
]

Entry = Structure | BadEntry

_TABLE = Chem.GetPeriodicTable()
_QM9_NAME = re.compile(r"dsgdb9nsd_(\d+)\.xyz$")
_UNCHARACTERIZED_HEADER = 9  # lines
_PROPERTIES = re.compile(r"\bProperties\s*=\s*\"?([\w:]+)", re.IGNORECASE)
_COLUMN = re.compile(r"(\w+):([a-z]):(\d+)")
_NOT_A_NUMBER = re.compile(r"\b(nan|inf)\b", re.IGNORECASE)


def read_qm9(path: Path, left_out: frozenset[int] = frozenset()) -> Iterator[Entry]:
    """Iterate over QM9 as distributed: dsgdb9nsd.xyz.tar.bz2, or the folder that it unpacks to.

    Args:
        path: The archive (any compression that tar knows) or folder.
        left_out: Numbers of molecules that are passed over.

    Raises:
        UsageError: There is no such archive or folder, it ends too early, or holds no QM9 files.
    """
    found = False
    for name, text in _folder_texts(path) if path.is_dir() else _tar_texts(path):
        match = _QM9_NAME.search(name)
        if match is None:
            continue
        found, number = True, int(match[1])
        if number not in left_out:
            yield _xyz_entry(_lines(text), Path(name).name, number)
    if not found:
        raise UsageError(f"{path} holds no files dsgdb9nsd_<number>.xyz; give QM9's raw archive")


def read_uncharacterized(path: Path) -> frozenset[int]:
    """Return the numbers in QM9's uncharacterized.txt: molecules that failed its consistency check.

    Raises:
        UsageError: The file is missing or holds no numbers.
    """
    lines = _lines(_text(existing(path)))[_UNCHARACTERIZED_HEADER:]
    first = [line.split()[0] for line in lines if line.strip()]
    numbers = frozenset(int(word) for word in first if word.isdigit())
    if not numbers:
        raise UsageError(
            f"{path} holds no numbers below its header; give QM9's uncharacterized.txt"
        )
    return numbers


def read_xyz(path: Path) -> Iterator[Entry]:
    """Iterate over the frames of an .xyz file: a count, a comment, and a line for every atom.

    A line has an element and a position first, or where the comment's `Properties=` of the extended
    format say.

    Raises:
        UsageError: The file is missing.
    """
    lines = _lines(_text(existing(path)))
    place = number = 0
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        number += 1
        frame = lines[place : place + _count(lines[place]) + 2]
        entry = _xyz_entry(frame, f"frame {number} at line {place + 1}", number)
        yield entry
        if isinstance(entry, BadEntry):
            place = _next_frame(lines, place + 1)
        else:
            place += len(entry.symbols) + 2


def read_sdf(path: Path, titles: Path | None = None) -> Iterator[Entry]:
    """Iterate over the entries of an .sdf file.

    Args:
        path: The file.
        titles: A .csv file beside it with a row per entry, whose first column must be the entries'
            titles, as QM9's gdb9.sdf.csv.

    Raises:
        UsageError: A file is missing.
    """
    known = _first_column(titles) if titles else None
    with existing(path).open(encoding=encoding(path), errors="replace") as file:
        for number, (line, block, ended) in enumerate(_blocks(file), 1):
            name = f"entry {number} at line {line}"
            if not ended:
                yield BadEntry(name, "no end", "no line M  END: it is cut off")
                continue
            title = block[0].strip()
            if known is not None and (number > len(known) or title != known[number - 1]):
                other = known[number - 1] if number <= len(known) else "nothing"
                detail = f"{title!r}, but the table has {other!r}"
                yield BadEntry(name, "a title other than the table's", detail)
                continue
            yield _sdf_entry(block, name, _number_of(title, number))


def read_smiles(path: Path, column: str = "smiles") -> Iterator[tuple[str, int, str]]:
    """Iterate over name, line number and SMILES of a .csv file, or of one with a SMILES a line.

    Args:
        path: A .csv file with a header, or another where SMILES come first on the lines.
        column: Name of the SMILES' column in a .csv file.

    Raises:
        UsageError: The file is missing or has no such column.
    """
    if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zip"):
        raise UsageError(f"{path} is compressed; unpack it first")
    with existing(path).open(encoding=encoding(path), errors="replace", newline="") as file:
        if path.suffix.lower() != ".csv":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", number, line.split()[0]
            return
        rows = csv.DictReader(file)
        if column not in (rows.fieldnames or []):
            raise UsageError(
                f"{path} has no column {column!r} but {list(rows.fieldnames or [])}; set column"
            )
        for row in rows:
            yield f"line {rows.line_num}", rows.line_num, (row[column] or "").strip()


def read_arrays(path: Path) -> Iterator[Entry]:
    """Iterate over the molecules of an .npz file.

    It holds `positions` [n, N, 3] in Angstrom, `atomic_numbers` [n, N] with 0 or less for padding,
    and perhaps `n_atoms` [n], at most N, which cuts off padding that is no 0.

    Raises:
        UsageError: The file is missing or lacks an array, or their shapes do not fit.
    """
    source = existing(path)
    try:
        with np.load(source, allow_pickle=False) as file:
            positions = file["positions"].astype(np.float64)
            numbers = file["atomic_numbers"].astype(np.int64)
            sizes = known = (numbers > 0).cumprod(axis=-1).sum(axis=-1)
            if "n_atoms" in file.files:
                sizes = file["n_atoms"].astype(np.int64)
    except Exception as error:  # numpy reads headers as Python, which fails in many ways
        raise UsageError(
            f"{path} is no .npz file with arrays positions and atomic_numbers ({reason(error)})"
        ) from error
    if positions.shape != (*numbers.shape, 3) or sizes.shape != numbers.shape[:1]:
        raise UsageError(
            f"{path} has positions {positions.shape}, atomic_numbers {numbers.shape} and n_atoms "
            f"{sizes.shape}; they must be [n, N, 3], [n, N] and [n]"
        )
    most = numbers.shape[1]
    cut = np.minimum(sizes.clip(min=0), known)
    for row, (size, place, number) in enumerate(zip(cut, positions, numbers, strict=True)):
        if sizes[row] > most:
            detail = f"n_atoms is {sizes[row]}, the arrays have {most}"
            yield BadEntry(f"row {row}", "more atoms than its arrays", detail)
            continue
        symbols = [_element(value) for value in number[:size].tolist()]
        yield Structure(f"row {row}", row, symbols, place[:size])


def _folder_texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in listed(folder, "*.xyz"):
        yield path.name, _text(path)


def _tar_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Iterate over names and texts of an archive's .xyz files, read once from front to back."""
    try:
        with tarfile.open(existing(path), "r|*") as archive:
            for member in archive:
                hidden = PurePosixPath(member.name).name.startswith(".")
                wanted = member.name.endswith(".xyz") and not hidden
                file = archive.extractfile(member) if wanted else None
                if file is not None:
                    yield member.name, file.read().decode("utf-8", errors="replace")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(
            f"{path} is no whole tar archive ({error}); give QM9's dsgdb9nsd.xyz.tar.bz2"
        ) from error


def _xyz_entry(lines: list[str], name: str, number: int) -> Entry:
    """Return the structure of a frame; lines after its atoms, as QM9 has them, are ignored."""
    size = _count(lines[0]) if lines else 0
    if size < 1:
        return BadEntry(name, "no number of atoms", lines[0].strip()[:40] if lines else "")
    atoms = lines[2 : 2 + size]
    if len(atoms) < size:
        return BadEntry(name, "fewer atoms than it says", f"{len(atoms)} of {size}")
    columns = _columns(lines[1])
    if columns is None:
        detail = lines[1].strip()[:60]
        return BadEntry(name, "Properties without columns species:S:1 and pos:R:3", detail)
    symbols, positions = [], np.empty((size, 3))
    for i, line in enumerate(atoms):
        try:
            symbol, positions[i] = _xyz_atom(line, *columns)
        except ValueError:
            return BadEntry(name, "an unreadable atom", f"atom {i + 1}: {line.strip()[:60]!r}")
        symbols.append(symbol)
    return Structure(name, number, symbols, positions)


def _columns(comment: str) -> tuple[int, int] | None:
    """Return the columns of element and position, after the comment of the extended format.

    None where it says what the columns are and these are not among them.
    """
    match = _PROPERTIES.search(comment)
    if match is None:
        return 0, 1
    found, place = {}, 0
    for name, kind, count in _COLUMN.findall(match[1].lower()):
        found[name, kind, int(count)] = place
        place += int(count)
    element = found.get(("species", "s", 1), found.get(("z", "i", 1)))
    position = found.get(("pos", "r", 3))
    return None if element is None or position is None else (element, position)


def _xyz_atom(line: str, element: int = 0, position: int = 1) -> tuple[str, list[float]]:
    """Return symbol and position; raises ValueError where there are none.

    Args:
        line: The atom's.
        element: Column of the symbol or atomic number.
        position: First of the three columns of the position.
    """
    words = line.split()
    (name,), (x, y, z) = words[element : element + 1], words[position : position + 3]
    return _symbol(name), [_float(word) for word in (x, y, z)]


def _count(line: str) -> int:
    """Return the number that a line begins with; 0 where there is none."""
    first = line.split()[:1]
    return int(first[0]) if first and first[0].isascii() and first[0].isdigit() else 0


def _next_frame(lines: list[str], start: int) -> int:
    """Return where the next frame begins after one that cannot be read: a count, then an atom."""
    for place in range(start, len(lines) - 2):
        if len(lines[place].split()) == 1 and _count(lines[place]):
            try:
                _xyz_atom(lines[place + 2], *(_columns(lines[place + 1]) or ()))
            except ValueError:
                continue
            return place
    return len(lines)


def _blocks(file: TextIO) -> Iterator[tuple[int, list[str], bool]]:
    """Iterate over first line number, lines, and whether the end was there, of SDF entries."""
    block: list[str] = []
    first, complete = 1, False
    for number, line in enumerate(file, 1):
        if line.startswith("$$$$"):
            yield first, block or [""], complete
            block, first, complete = [], number + 1, False
            continue
        complete = complete or line.startswith("M  END")
        block.append(line.rstrip("\n"))
    if any(line.strip() for line in block):
        # Files of a single molecule often lack the last line; without the atoms' end it was cut.
        yield first, block, complete


def _sdf_entry(block: list[str], name: str, number: int) -> Entry:
    atoms = takewhile(lambda line: not line.startswith("M  END"), block[4:])
    if any(_NOT_A_NUMBER.search(line) for line in atoms):
        return BadEntry(name, "a position that is not finite")
    mol = Chem.MolFromMolBlock("\n".join(block), sanitize=False, removeHs=False)
    if mol is None or not mol.GetNumAtoms():
        return BadEntry(name, "an unreadable structure", block[0].strip())
    positions = mol.GetConformer().GetPositions()
    symbols = [atom.GetSymbol() for atom in mol.GetAtoms()]
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        return BadEntry(name, "a radical")
    if block[1][20:22].upper() == "2D" and not positions[:, 2].any():
        return BadEntry(name, "no conformer", "its positions are those of a drawing")
    mol.UpdatePropertyCache(strict=False)
    missing = sum(atom.GetTotalNumHs() for atom in mol.GetAtoms())
    # Orders and charges of the file are not used otherwise, and often wrong; several atoms without
    # a bond say nothing of hydrogens.
    unbonded = len(symbols) > 1 and not mol.GetNumBonds()
    if missing and (unbonded or _is_whole(symbols, positions)):
        missing = 0
    return Structure(name, number, symbols, positions, missing)


def _is_whole(symbols: list[str], positions: NDArray[np.float64]) -> bool:
    """Return whether every atom has the bonds of its valence by positions alone."""
    if not set(symbols) <= set(EXPLICIT) or not np.isfinite(positions).all():
        return False
    types = torch.tensor([[EXPLICIT.index(symbol) for symbol in symbols]])
    molecule = Molecules.of(torch.from_numpy(positions[None]).float(), types, EXPLICIT)
    return bool(bonds.molecule_stability(molecule))


def _first_column(path: Path) -> list[str]:
    with existing(path).open(encoding=encoding(path), errors="replace", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        return [row[0].strip() for row in rows if row]


def _text(path: Path) -> str:
    return path.read_text(encoding=encoding(path), errors="replace")


def _lines(text: str) -> list[str]:
    """Return a text's lines. Form feeds and Unicode's separators, which comments hold, end none."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


def _number_of(title: str, number: int) -> int:
    """Return the number in a title such as QM9's gdb_17, or the entry's own."""
    match = re.fullmatch(r"gdb_(\d+)", title)
    return int(match[1]) if match else number


def _symbol(name: str) -> str:
    """Return an element's symbol, given that or its atomic number; else raise ValueError."""
    if name.isdigit():
        return _element(int(name))
    if not name.isalpha():
        raise ValueError(name)
    return name.capitalize()


def _element(number: int) -> str:
    """Return the symbol of an atomic number, or that there is none."""
    known = SYMBOLS.get(number)
    return known or (_TABLE.GetElementSymbol(number) if 0 < number < 119 else f"element {number}")


def _float(word: str) -> float:
    # QM9's files write small numbers as Mathematica does, 1.5*^-6.
    value = float(word.replace("*^", "e"))
    return value if math.isfinite(value) else math.nan
