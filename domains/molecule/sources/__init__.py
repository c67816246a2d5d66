"""Where molecules come from: the enumerated set, QM9, and files of one's own."""

from domains.molecule.sources.base import Source
from domains.molecule.sources.enumerated import Enumerated
from domains.molecule.sources.files import QM9, MoleculeFile, SmilesFile, edm_split
from lit_rlft.kit.sources import Splits

__all__ = ["QM9", "Enumerated", "MoleculeFile", "SmilesFile", "Source", "Splits", "edm_split"]
