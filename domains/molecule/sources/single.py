"""Single molecules, as `predict` writes them: all that a model draws, also what is not valid."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.molecule.samples import EMPTY
from domains.molecule.sources.formats import Entry, read_sdf, read_xyz
from domains.molecule.sources.packed import Structure
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry

__all__ = ["read_molecule"]

_READERS = {".sdf": read_sdf, ".xyz": read_xyz}
_FORM = '{"symbols": ["C", ...], "positions": [[x, y, z], ...]}'


def read_molecule(
    sample: Any, folder: Path, elements: Sequence[str], max_atoms: int, num_atoms: int
) -> dict[str, Tensor]:
    """Return one molecule's `positions` [N, 3] around their mean, and `types` [N].

    Args:
        sample: The .sdf or .xyz file, relative to `folder`, whose first entry is read; or
            `{"symbols": [...], "positions": [[x, y, z], ...]}` in Angstrom.
        folder: Where the file is.
        elements: Symbols of the types; without "H" hydrogens are left out.
        max_atoms: N.
        num_atoms: How many atoms its condition asks for.

    Raises:
        UsageError: It is no molecule, or has other elements or another number of atoms.
    """
    entry = next(_entries(sample, folder), None)
    if entry is None or isinstance(entry, BadEntry):
        raise UsageError(f"{sample}: {entry or 'no molecule is in it'}; give one of its own")
    implicit = () if "H" in elements else ("H",)
    if unknown := sorted(set(entry.symbols) - {*elements, *implicit}):
        raise UsageError(f"it has atoms of {', '.join(unknown)}, the model knows {list(elements)}")
    kept = [i for i, symbol in enumerate(entry.symbols) if symbol in elements]
    if len(kept) != num_atoms:
        raise UsageError(f"it has {len(kept)} atoms, its condition's num_atoms is {num_atoms}")
    places = np.asarray(entry.positions, np.float64)[kept]
    if not np.isfinite(places).all():
        raise UsageError("it has a position that is not finite; take the line out")
    positions, types = torch.zeros(max_atoms, 3), torch.full((max_atoms,), EMPTY)
    positions[:num_atoms] = torch.from_numpy(places - places.mean(axis=0)).float()
    types[:num_atoms] = torch.tensor([list(elements).index(entry.symbols[i]) for i in kept])
    return {"positions": positions, "types": types}


def _entries(sample: Any, folder: Path) -> Iterator[Entry]:
    if not isinstance(sample, str):
        return iter([_structure(sample)])
    reader = _READERS.get(Path(sample).suffix.lower())
    if reader is None:
        raise UsageError(f"{sample} is no .sdf or .xyz file; give one, or {_FORM}")
    return reader(folder / sample)


def _structure(sample: Any) -> Structure:
    symbols = sample.get("symbols") if isinstance(sample, Mapping) else None
    try:
        positions = np.asarray(sample["positions"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"a molecule is a file or {_FORM}") from error
    if not isinstance(symbols, list) or positions.shape != (len(symbols), 3):
        raise UsageError(f"a molecule is a file or {_FORM}, with as many symbols as positions")
    return Structure("it", 1, [str(symbol) for symbol in symbols], positions)
