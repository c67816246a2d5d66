"""What a round writes to the log, averaged over its updates and over processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_rlft.distributed import gather
from lit_rlft.loop.updates import is_maximum
from lit_rlft.runs.folder import summary_writer

if TYPE_CHECKING:
    from lit_rlft.algorithms.base import Experience, RewardFineTuner

__all__ = ["log_round", "round_means"]

Outcomes = Sequence[Mapping[str, float]]
"""Values of each update of a round, by name."""


def log_round(tuner: RewardFineTuner, experience: Experience, outcomes: Outcomes) -> None:
    """Log a round's means, learning rate and costs; histograms and reward curves go to TensorBoard.

    Args:
        tuner: Whose round it was; all its processes take part.
        experience: What was collected.
        outcomes: Of the round's updates.
    """
    world_size = tuner.trainer.world_size
    means = round_means(experience.metrics, outcomes, world_size)
    for name, value in means.items():
        tuner.log(f"train/{name}", value, prog_bar=name in ("reward", "loss"))
    tuner.log("train/learning_rate", tuner.trainer.optimizers[0].param_groups[0]["lr"])
    reward_calls = tuner.cost.reward_calls * world_size
    tuner.log("cost/samples", float(tuner.num_samples))
    tuner.log("cost/reward_calls", float(reward_calls))
    tuner.log("cost/denoiser_calls", float(tuner.cost.denoiser_calls * world_size))
    writer = summary_writer(tuner)
    if writer is None:
        return
    for name, values in experience.histograms.items():
        if values.numel():
            writer.add_histogram(f"train/{name}", values.cpu(), tuner.num_updates)
    if "reward" in means:
        writer.add_scalar("train/reward_by_samples", means["reward"], tuner.num_samples)
        writer.add_scalar("train/reward_by_reward_calls", means["reward"], reward_calls)


def round_means(
    metrics: Mapping[str, float], outcomes: Outcomes, world_size: int
) -> dict[str, float]:
    """Average over updates and processes; one without samples has no losses, which counts as zeros.

    Args:
        metrics: Of the round; NaN where a process does not know.
        outcomes: Of its updates; of names that end in `_max` the largest is taken.
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
