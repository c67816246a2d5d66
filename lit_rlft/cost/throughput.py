"""How fast a round of training was, for the log."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RoundCost", "throughput"]


@dataclass(frozen=True)
class RoundCost:
    """What a round took.

    Attributes:
        seconds: From its begin to its end, on this process.
        samples: Drawn by all processes.
        denoiser_calls: Rows that the denoiser was evaluated on, by all processes.
        flops: Operations of this process, backward passes included.
        phases: Seconds of this process by phase.
    """

    seconds: float
    samples: int
    denoiser_calls: int
    flops: int
    phases: Mapping[str, float]


def throughput(cost: RoundCost, world_size: int, peak: float | None) -> dict[str, float]:
    """Return what is logged under `time/`, by name; what has no value is left out.

    Args:
        cost: Of the round.
        world_size: Number of processes, which draw as many samples each.
        peak: Operations per second that this process's device could reach; None if not known.

    Returns:
        `samples_per_second` and `denoiser_rows_per_second` of all processes; `mfu`, the share of
        the device's peak (model FLOPs utilisation); and of each phase its seconds, by its name,
        and `<name>_ms_per_sample`, the milliseconds for each sample that the round drew.
    """
    values = {name: seconds for name, seconds in cost.phases.items() if seconds > 0}
    if cost.samples:
        each = 1000 * world_size / cost.samples
        values |= {f"{name}_ms_per_sample": s * each for name, s in values.items()}
    if cost.seconds <= 0:
        return values
    values["samples_per_second"] = cost.samples / cost.seconds
    values["denoiser_rows_per_second"] = cost.denoiser_calls / cost.seconds
    if peak is not None:
        values["mfu"] = cost.flops / (cost.seconds * peak)
    return values
