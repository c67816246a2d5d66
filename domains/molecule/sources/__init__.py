"""Where molecules come from: the enumerated set, QM9, and files of one's own."""

from domains.molecule.sources.base import (
    QM9,
    Enumerated,
    MoleculeFile,
    SmilesFile,
    Source,
    Splits,
    edm_split,
)

__all__ = ["QM9", "Enumerated", "MoleculeFile", "SmilesFile", "Source", "Splits", "edm_split"]
