"""What a round writes to the log, averaged over its updates and over processes."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.distributed import gather
from lit_rlft.loop.tally import is_maximum

__all__ = ["Outcomes", "RoundLog", "round_means"]

_LARGEST_BIN = 1e19

Outcomes = Sequence[Mapping[str, float]]
"""Values of each update of a round, by name."""


class RoundLog:
    """Logs rounds, to all loggers of a trainer.

    A number that a round lacks is logged as NaN, which is no point of a curve: Lightning would log
    that of the round before once more. What early stopping monitors stays, since NaN would stop.

    Args:
        log: Takes a name and a value, as `LightningModule.log`.
        trainer: That runs the rounds; with none, there are none.
    """

    def __init__(self, log: Callable[..., None], trainer: Trainer | None) -> None:
        self._log, self._trainer, self._known = log, trainer, set[str]()

    def write(
        self,
        writer: SummaryWriter | None,
        means: Mapping[str, float],
        spent: Mapping[str, int],
        histograms: Mapping[str, Tensor],
        num_updates: int,
    ) -> None:
        """Log a round's means under `train/`, what was spent so far under `cost/`, and histograms.

        Args:
            writer: TensorBoard's; None writes no histograms.
            means: Of the round, by name.
            spent: "samples", "reward_calls" and "denoiser_calls" so far.
            histograms: Values to show, by name; those of all processes are shown together.
            num_updates: Optimiser steps so far.
        """
        assert self._trainer is not None
        stopping = {callback.monitor for callback in self._trainer.early_stopping_callbacks}
        missing = {name for name in self._known - means.keys() if f"train/{name}" not in stopping}
        self._known |= means.keys()
        for name, value in {**means, **dict.fromkeys(sorted(missing), math.nan)}.items():
            self._log(f"train/{name}", value, prog_bar=name in ("reward", "loss"))
        for name, number in spent.items():
            self._log(f"cost/{name}", float(number))
        _write(writer, means, spent, histograms, num_updates, self._trainer.world_size)


def _write(
    writer: SummaryWriter | None,
    means: Mapping[str, float],
    spent: Mapping[str, int],
    histograms: Mapping[str, Tensor],
    num_updates: int,
    world_size: int,
) -> None:
    """Write a round's histograms, and its reward over samples and over reward calls."""
    parts = gather({name: _shown(values) for name, values in histograms.items()}, world_size)
    if writer is None:
        return
    for name in histograms:
        if (shown := torch.cat([part[name] for part in parts])).numel():
            # Of a tag that has both, TensorBoard shows histograms alone.
            writer.add_histogram(f"histograms/{name}", shown, num_updates)
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
