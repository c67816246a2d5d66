"""What a round writes to the log, averaged over its updates and over processes."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.distributed import gather
from lit_rlft.loop.tally import is_maximum

__all__ = ["Outcomes", "log_round", "round_means", "write_round"]

_LARGEST_BIN = 1e19

Outcomes = Sequence[Mapping[str, float]]
"""Values of each update of a round, by name."""


def log_round(
    log: Callable[..., None], means: Mapping[str, float], spent: Mapping[str, int]
) -> None:
    """Log a round's means under `train/` and what was spent so far under `cost/`.

    Args:
        log: Takes a name and a value, as `LightningModule.log`.
        means: Of the round, by name.
        spent: "samples", "reward_calls" and "denoiser_calls".
    """
    for name, value in means.items():
        log(f"train/{name}", value, prog_bar=name in ("reward", "loss"))
    for name, number in spent.items():
        log(f"cost/{name}", float(number))


def write_round(
    writer: SummaryWriter | None,
    means: Mapping[str, float],
    spent: Mapping[str, int],
    histograms: Mapping[str, Tensor],
    num_updates: int,
    world_size: int = 1,
) -> None:
    """Write a round's histograms, and its reward over samples and over reward calls.

    Args:
        writer: TensorBoard's; None writes nothing.
        means: Of the round, by name.
        spent: "samples" and "reward_calls" so far.
        histograms: Values to show, by name; those of all processes are shown together.
        num_updates: Optimiser steps so far.
        world_size: Number of processes, all of which must call this.
    """
    parts = gather({name: _shown(values) for name, values in histograms.items()}, world_size)
    if writer is None:
        return
    for name in histograms:
        if (shown := torch.cat([part[name] for part in parts])).numel():
            writer.add_histogram(f"train/{name}", shown, num_updates)
    if "reward" in means:
        for axis in ("samples", "reward_calls"):
            writer.add_scalar(f"train/reward_by_{axis}", means["reward"], spent[axis])


def _shown(values: Tensor) -> Tensor:
    """Return the finite values, brought into the range of TensorBoard's bins, which end at 1e20."""
    values = values.detach().double().cpu().flatten()
    return values[values.isfinite()].clamp(-_LARGEST_BIN, _LARGEST_BIN)


def round_means(
    metrics: Mapping[str, float], outcomes: Outcomes, world_size: int
) -> dict[str, float]:
    """Average over updates and processes; losses of a process without samples count as zeros.

    Args:
        metrics: Values of the round; NaN where a process has none.
        outcomes: Values of its updates; the largest is taken where the name ends in `_max`.
        world_size: Number of processes, all of which take part.
    """
    parts = gather((dict(metrics), list(outcomes)), world_size)
    means: dict[str, float] = {}
    for name in metrics:
        known = [own[name] for own, _ in parts if not math.isnan(own[name])]
        if known:
            means[name] = sum(known) / len(known)
    values: dict[str, list[float]] = defaultdict(list)
    for outcomes_of_update in zip(*(own for _, own in parts), strict=True):
        # A name belongs to the updates that have it: not every one trains every step.
        for name in sorted({name for outcome in outcomes_of_update for name in outcome}):
            known = [outcome.get(name, 0.0) for outcome in outcomes_of_update]
            values[name].append(max(known) if is_maximum(name) else sum(known) / world_size)
    return means | {
        name: max(every) if is_maximum(name) else sum(every) / len(every)
        for name, every in values.items()
    }
