"""Fingerprints of states that tolerate rounding differences between machines."""

from collections.abc import Sequence

import torch

from lit_rlft.core.state import State, flatten

__all__ = ["alike", "probe"]

_NUM_DIRECTIONS = 2
_SEED = 21
_TOLERANCE = 5e-3
"""In units of states of unit variance: rounding, also in half precision, stays well below it."""


def probe(states: State) -> list[float]:
    """Return projections of each state on two fixed random directions, B * 2 numbers.

    Unlike a checksum they forgive rounding; a change of any entries, their order or their signs
    moves them as much as it moves the state, in root mean square over its entries.
    """
    x = flatten(states).detach().double().cpu()
    generator = torch.Generator().manual_seed(_SEED)
    size = (x.shape[1], _NUM_DIRECTIONS)
    directions = torch.randn(size, generator=generator, dtype=torch.float64)
    return (x @ directions / x.shape[1] ** 0.5).flatten().tolist()


def alike(held: Sequence[float], own: Sequence[float]) -> bool:
    """Return whether two lists of numbers are equal up to rounding."""
    if len(held) != len(own):
        return False
    first, second = (torch.tensor(values, dtype=torch.float64) for values in (held, own))
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE)
