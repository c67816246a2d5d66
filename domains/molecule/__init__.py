"""Molecules: atoms in space, from an enumerated set of small ones to QM9.

RDKit's own messages are switched off in every process that imports the domain: what is wrong with
a molecule is told by this project's own messages and metrics.
"""

from pathlib import Path

from rdkit import rdBase

__all__ = ["EMBEDDED"]

rdBase.DisableLog("rdApp.*")

EMBEDDED = Path(__file__).parent / "assets"
"""Folder of the models that ship with the domain, reachable by their bare names."""
