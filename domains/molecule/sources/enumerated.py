"""The enumerated molecules: small ones grown at random; one set of them ships."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from domains.molecule import EMBEDDED
from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.samples import EMPTY
from domains.molecule.sources.base import Source
from domains.molecule.sources.embedded import embedded
from domains.molecule.sources.enumeration import enumerate_smiles
from domains.molecule.sources.formats import Entry
from domains.molecule.sources.packed import Packed, molecules_of
from lit_rlft.core.checks import UsageError, at_least

__all__ = ["ASSET", "Enumerated"]

ASSET = EMBEDDED / "enumerated.safetensors"
"""The enumerated molecules of the default settings."""

_STEP = 2e-4  # Angstrom


class Enumerated(Source):
    """Small molecules grown at random under valence, embedded, stable by the bond tables.

    Molecules are drawn until a number of attempts is used up, and each is kept once: with few
    heavy atoms nearly all that the rules allow. They depend on the settings alone. All 6,407 of the
    default settings are read by the tables as the molecules that were grown. Without hydrogens
    among the elements 171 of 6,578 are read as others; they are kept as what they are read as.

    Args:
        max_heavy: Most heavy atoms.
        num_attempts: Molecules grown, before those that occurred and are rejected are left out.
        seed: Seed of the growth.
        elements: Symbols of the types; without "H" only heavy atoms are kept.
        num_workers: Worker processes that grow and embed; 0 works in this one.
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
        at_least(1, self, max_heavy=max_heavy, num_attempts=num_attempts)
        at_least(0, self, seed=seed, num_workers=num_workers)
        # A chain of n carbon atoms has 2 n + 2 hydrogens.
        max_atoms = 3 * max_heavy + 2 if "H" in elements else max_heavy
        super().__init__(elements, max_atoms, only_stable=True, **source)
        self.max_heavy, self.num_attempts, self.seed = max_heavy, num_attempts, seed
        self.num_workers = num_workers

    @property
    def label(self) -> str:
        return f"enumerated molecules of at most {self.max_heavy} heavy atoms"

    def entries(self) -> Iterable[Entry]:
        smiles = enumerate_smiles(self.max_heavy, self.num_attempts, self.seed, self.num_workers)
        lines = [(f"molecule {i}", i, text) for i, text in enumerate(smiles)]
        settings = (self.elements, self.max_atoms, False, self.num_workers)
        return embedded(lines, *settings, compared=False)

    def settings(self) -> list[Any]:
        return [self.max_heavy, self.num_attempts, self.seed]

    def load(self) -> Packed:
        """Return the molecules: those that ship with the package where the settings are theirs."""
        if not self._is_shipped():
            return super().load()
        return _unpacked(load_file(ASSET), self.max_atoms)

    def prepare(self) -> None:
        if not self._is_shipped():
            super().prepare()

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
        if not ASSET.is_file():
            return False
        with safe_open(ASSET, "np") as file:
            return (file.metadata() or {}).get("settings") == self.digest()


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
