"""The parts of the benchmark, in the order in which they run."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import (
    decode,
    denoisers,
    drtune,
    embedded_fit,
    fits,
    limits,
    replay,
    sampling,
    scaling,
    sdxl_memory,
    small_domains,
    synchronisations,
    toggles,
    workers,
)

__all__ = ["PARTS", "Part"]


class Part(NamedTuple):
    """A part.

    Attributes:
        measure: Adds the rows of its cases.
        weight: Its share of the time, beside those of the others.
    """

    measure: Callable[[Bench], None]
    weight: float


PARTS: Mapping[str, Part] = {
    "limits": Part(limits.measure, 1),
    "sampling": Part(sampling.measure, 4),
    "replay": Part(replay.measure, 3),
    "toggles": Part(toggles.measure, 4),
    "drtune": Part(drtune.measure, 2),
    "sdxl_memory": Part(sdxl_memory.measure, 3),
    "decode": Part(decode.measure, 1),
    "denoisers": Part(denoisers.measure, 2),
    "small_domains": Part(small_domains.measure, 1),
    "workers": Part(workers.measure, 1),
    "synchronisations": Part(synchronisations.measure, 1),
    "embedded_fit": Part(embedded_fit.measure, 1),
    "fits": Part(fits.measure, 3),
    "scaling": Part(scaling.measure, 1),
}
