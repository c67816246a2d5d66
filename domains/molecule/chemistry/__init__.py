"""Chemistry of small molecules: elements, bonds by distance, RDKit's view of a batch, geometries.

The package imports nothing by itself: workers that compute geometries start without torch.
"""

from typing import Any

from lit_rlft.moved import moved_name

_MOVED = dict.fromkeys(
    ("INVALID", "Chemistry", "chemistry_of", "keys"), "domains.molecule.chemistry.batch"
)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name, _MOVED)
