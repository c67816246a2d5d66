"""Networks of the domain: an equivariant one, a transformer, EDM, and what surrounds them."""

from domains.molecule.networks.architecture import Architecture
from domains.molecule.networks.base import MoleculeNetwork, load_network
from domains.molecule.networks.egnn import EGNN
from domains.molecule.networks.transformer import Transformer

__all__ = ["EGNN", "Architecture", "MoleculeNetwork", "Transformer", "load_network"]
