"""Molecules: atoms in space, from an enumerated set of small ones to QM9.

The domain switches RDKit's own messages off: its own messages and metrics say what is wrong with a
molecule.
"""

from pathlib import Path

from rdkit import rdBase

__all__ = ["EMBEDDED"]

rdBase.DisableLog("rdApp.*")

EMBEDDED = Path(__file__).parent / "assets"
"""Folder of the models that ship with the domain, reachable by their bare names."""
