"""Lines that a run prints: the facts at its start, and one a round where no bar is shown."""

import os
import sys
from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks import budget
from lit_rlft.kit.data import batches_seen

__all__ = ["Facts", "RoundLines"]

_MAX_LINES = 200
"""Lines that `RoundLines` prints of a fit at most, apart from those of validations."""


class Facts(Callback):
    """Prints one line at the start of a fit: the model, the device and the length of the run.

    A fit that has nothing left to do says so at its end.
    """

    def __init__(self) -> None:
        self._begun = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier fits."""
        self._begun = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that nothing was trained, why, and what would prolong the run."""
        assert isinstance(pl_module, RewardFineTuner)
        if not self._begun:
            say(_idle(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        self._begun = True
        assert isinstance(pl_module, RewardFineTuner)
        data = getattr(trainer, "datamodule", None)
        conditions = getattr(data, "batch_size", None)
        rows = getattr(trainer.train_dataloader, "dataset", None)
        if conditions is not None and isinstance(rows, Sized):
            conditions = min(conditions, len(rows))  # fewer rows are one batch
        say(facts(trainer, pl_module, conditions))


class RoundLines(Callback):
    """Prints a line a round, and one for each validation: for logs, where bars leave debris.

    Of a long fit it prints a line every 200th part of the way, so that there are 200 at most.
    """

    def __init__(self) -> None:
        self._printed = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from where a resumed fit is."""
        assert isinstance(pl_module, RewardFineTuner)
        self._printed = _way(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the round's reward and loss."""
        assert isinstance(pl_module, RewardFineTuner)
        if (way := _way(trainer, pl_module)) == self._printed:
            return
        self._printed = way
        done, total = batches_seen(trainer), num_rounds(trainer)
        of = f" of {total}" if total and not any(budget.limits(trainer)) else ""
        values = _named(trainer.callback_metrics, "train/", ("reward", "loss"))
        say(f"round {done}{of}: {values}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tuned model's reward beside the reference's."""
        assert isinstance(pl_module, RewardFineTuner)
        name, found = pl_module.reward.name, trainer.callback_metrics
        tuned, reference = (found.get(f"{arm}/{name}") for arm in ("val", "val_reference"))
        if trainer.sanity_checking or tuned is None or reference is None:
            return
        say(f"validation: {name} {float(tuned):.4g}, of the reference {float(reference):.4g}")


def facts(trainer: Trainer, module: RewardFineTuner, conditions: int | None) -> str:
    """Return one line: model, parameters, device, precision, what is to come or ends the fit.

    Args:
        trainer: At the start of a fit.
        module: What is trained.
        conditions: Of a round, over all processes, if they are known.
    """
    own = [p for p in module.trainable().parameters() if p.requires_grad]
    trained = sum(p.numel() for p in own)
    every = {id(p): p.numel() for p in [*module.pipeline.parameters(), *own]}
    frozen = sum(every.values()) - trained
    parts = [
        f"{module.algorithm} on {module.pipeline.name} for {module.reward.name}",
        f"{_short(trained)} parameters trained, {_short(frozen)} frozen",
        f"{_device(trainer)} {trainer.precision}{_tf32(trainer)}",
        *_halves(module),
        *_lengths(trainer, module, conditions),
    ]
    return "; ".join(parts)


def _idle(trainer: Trainer, module: RewardFineTuner) -> str:
    """Return why a fit had nothing to do."""
    lengths = [] if trainer.ckpt_path else ["max_epochs", "max_steps"]
    limits = ["limit_train_batches", *lengths]
    if zero := [f"trainer.{name}" for name in limits if getattr(trainer, name) == 0]:
        verb, them = ("is", "it") if len(zero) == 1 else ("are", "them")
        return f"nothing was trained: {' and '.join(zero)} {verb} 0; raise {them}"
    return _finished(trainer, module) if trainer.ckpt_path else "nothing was trained"


def _finished(trainer: Trainer, module: RewardFineTuner) -> str:
    """Return why a fit that was resumed had nothing to do."""
    epochs, limits = trainer.current_epoch, []
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        limits.append(f"--trainer.max_epochs above {epochs}")
    if 0 <= trainer.max_steps <= trainer.global_step:
        limits.append(f"--trainer.max_steps above {trainer.global_step}")
    if not limits:
        limits.append("--trainer.max_time, or the limit of the callback that stopped it,")
    return (
        f"nothing left to train: {trainer.ckpt_path} is the end of its run (round "
        f"{module.num_rounds}); raise {' and '.join(limits)} to go on"
    )


def _way(trainer: Trainer, module: RewardFineTuner) -> int:
    """Return how many lines a fit has come to: `_MAX_LINES` at its end, rounds where none is set.

    The nearest of its ends counts: rounds, updates, or calls of a budget.
    """
    done, total = batches_seen(trainer), num_rounds(trainer)
    ends = [(done, total)] if total else []
    if trainer.max_steps > 0:
        ends.append((trainer.global_step, trainer.max_steps))
    ends += [(module.meter.total(name), most) for name, most in budget.limits(trainer)]
    return max((_MAX_LINES * of // most for of, most in ends), default=done)


def num_rounds(trainer: Trainer) -> int | None:
    """Return how many rounds a fit has from its start to its end, where that is fixed."""
    return None if trainer.max_steps >= 0 else _rounds_of_epochs(trainer)


def _rounds_of_epochs(trainer: Trainer) -> int | None:
    """Return how many rounds a fit has until its last epoch ends, where one is the last."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or batches == float("inf"):
        return None
    # Of a resumed run, epochs so far may have had another number of rounds.
    progress: Any = trainer.fit_loop.epoch_progress.current
    loop: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    begun = progress.started > progress.processed
    left = max(epochs - progress.processed, 0) * batches
    return batches_seen(trainer) + int(left - begun * min(loop.processed, batches))


@rank_zero_only
def say(text: str) -> None:
    """Print on the main process, at once and above any progress bar.

    Where nobody reads any more, as after the end of `| tee`, the run goes on.
    """
    # What a live display of rich puts in place of standard output never ends in a notebook.
    out = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    try:
        tqdm.write(text, file=out)
        out.flush()
    except BrokenPipeError:  # what is held back would fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _lengths(trainer: Trainer, module: RewardFineTuner, conditions: int | None) -> list[str]:
    budgets = [f"{most:,} {name.replace('_', ' ')}" for name, most in budget.limits(trainer)]
    until = [f"until {' or '.join(budgets)}"] if budgets else []
    rounds = num_rounds(trainer)
    if trainer.max_steps >= 0:
        # A round is never left in the middle.
        most = _rounds_of_epochs(trainer)
        ends = f"the round of update {trainer.max_steps:,}"
        also = "" if most is None else f" or for {most:,} {_rounds(most)}"
        return [f"until {ends}{also}", *until]
    if rounds is None:
        return until
    left = max(rounds - batches_seen(trainer), 0)
    noun = _rounds(rounds)
    if until:
        return [f"up to {left:,} {noun}", *until]
    parts = [f"{left:,} {noun}" if left == rounds else f"{left:,} of {rounds:,} {noun} to come"]
    candidates = getattr(module, "num_candidates", None)
    draws = not getattr(module, "offline", False)
    if candidates is not None and conditions is not None and draws:
        parts.append(f"{left * conditions * candidates:,} reward calls to come")
    return parts


def _rounds(count: int) -> str:
    return "round" if count == 1 else "rounds"


def _device(trainer: Trainer) -> str:
    device: torch.device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def _tf32(trainer: Trainer) -> str:
    """Return whether float32 is multiplied as TF32, on a GPU."""
    if trainer.strategy.root_device.type != "cuda":
        return ""
    return " without TF32" if torch.get_float32_matmul_precision() == "highest" else " with TF32"


def _halves(module: RewardFineTuner) -> list[str]:
    """Return the precision of frozen weights and of the reward's, where not all are in float32."""
    weights = {
        "frozen weights": [p for p in module.pipeline.parameters() if not p.requires_grad],
        "reward": list(module.reward.parameters()),
    }
    told = []
    for name, own in weights.items():
        types = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        if types not in ([], ["float32"]):
            told.append(f"{name} in {' and '.join(types)}")
    return told


def _named(found: Mapping[str, torch.Tensor], prefix: str, names: tuple[str, ...]) -> str:
    known = {name: float(found[prefix + name]) for name in names if prefix + name in found}
    return ", ".join(f"{name} {value:.4g}" for name, value in known.items() if value == value)


def _short(count: int) -> str:
    """Return a count as a person says it: 845, 2.1 k, 860 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
