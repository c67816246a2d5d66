"""Molecules: atoms in space, from an enumerated set of small ones to QM9.

RDKit's own messages are switched off in every process that imports the domain: what is wrong with
a molecule is told by this project's reports and metrics.
"""

from rdkit import rdBase

rdBase.DisableLog("rdApp.*")
