"""How often a tuned model's sample beats the reference's from the same condition and noise."""

from collections.abc import Iterable

import torch

from lit_rlft.distributed import gather
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.evaluation.measurements import Measurements, moments

__all__ = ["win_rates"]


def win_rates(
    measurements: Measurements, names: Iterable[str], world_size: int
) -> dict[str, Moments]:
    """Return the share of pairs in which the tuned model's value is higher, by measurement.

    A tie is half a win. Measurements by a column of the data, "<name>/<value>", come with theirs.

    Args:
        measurements: Of both models, on the same conditions and noise.
        names: Measurements of which higher is better.
        world_size: Number of processes; all of them must call this.
    """
    wanted = tuple(names)
    wins = {}
    for name, tuned in measurements.tuned.columns().items():
        reference = measurements.reference.columns().get(name)
        if name not in wanted and not name.startswith(tuple(f"{own}/" for own in wanted)):
            continue
        if reference is not None and reference.shape == tuned.shape:
            known = ~(tuned.isnan() | reference.isnan())
            higher, equal = tuned[known] > reference[known], tuned[known] == reference[known]
            wins[name] = higher.double() + 0.5 * equal.double()
    parts = gather(wins, world_size)
    every = dict.fromkeys(name for part in parts for name in part)
    return {name: moments(torch.cat([p[name] for p in parts if name in p])) for name in every}
