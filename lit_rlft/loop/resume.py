"""What a resumed run must share with the run before it, and what its user may change.

What would mix two experiments is refused. Other settings may differ: they are listed, and the
user's apply, also where torch or Lightning would take the checkpoint's without a word.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lit_rlft.core.checks import UsageError
from lit_rlft.core.settings import arguments, settings
from lit_rlft.kit.data import SplitData
from lit_rlft.loop import schedule_state
from lit_rlft.loop.settings import changes

__all__ = [
    "check_adapter",
    "check_optimizer",
    "check_same_batches",
    "check_same_run",
    "list_changes",
    "list_of_samples",
    "num_train_rows",
    "optimizer_settings",
]

OPTIMIZER, SCHEDULER = "model.optimizer", schedule_state.KEY
_ALPHA, _BATCH = "model.lora.alpha", "data.batch_size"
_COUNTERS_OF_SCHEDULERS = ("optimizer", "last_epoch")
_OF_A_SCHEDULE = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""What a schedule adds to the groups of an optimiser."""
_WITHOUT_EFFECT = (
    "model.num_eval_samples",
    "model.best_of",
    "model.sampling_batch_size",
    "model.microbatch_size",
    "model.gradient_checkpointing",
    "model.reward_workers",
    "model.lora.pretrained",
    "pipeline.decode_batch_size",
    "pipeline.checkpoint_denoiser",
    "pipeline.checkpoint_decoder",
    "data.eval_batch_size",
    "data.num_workers",
)
"""Settings that change no update: of evaluation, of memory, and where weights once came from."""
_OF_SAMPLES = (
    *("model.sampler", "model.cut", "model.start", "model.seed"),
    *("pipeline", "reward", "data.source", "data.test_source", "data.seed"),
)
"""Settings of what a test draws and how it is judged."""
_OF_MEANS = {
    *("batch_size", "num_workers", "encode_batch_size", "max_table_gb", "compile", "channels_last"),
    *("offload", "text_encoders", "tile_decoder", "embedding_cache", "cache_dir", "ahead"),
}
"""Last names of settings among these that change time and memory alone."""


def optimizer_settings(optimizer: Optimizer, scheduler: Any, made: Any = None) -> dict[str, Any]:
    """Return the settings of an optimiser and of a learning-rate schedule, if there is one.

    Args:
        optimizer: Has them.
        scheduler: Has them, or is None.
        made: What the schedule was made with; a command line's tells its arguments.
    """
    kind = type(optimizer)
    found: dict[str, Any] = {OPTIMIZER: f"{kind.__module__}.{kind.__qualname__}"}
    alone = _in_groups(optimizer, optimizer.param_groups)
    found |= _named({**alone, **optimizer.defaults}, OPTIMIZER)
    found |= settings(scheduler, SCHEDULER, _COUNTERS_OF_SCHEDULERS)
    for i, part in enumerate(schedule_state.nested(scheduler)):
        found |= settings(part, f"{SCHEDULER}.schedulers.{i}", _COUNTERS_OF_SCHEDULERS)
    if isinstance(made, partial):
        known = arguments(type(scheduler)).items()
        defaults = {name: p.default for name, p in known if p.default is not p.empty}
        found |= _named({**defaults, **made.keywords}, SCHEDULER)
    return found


def _named(arguments: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {
        name: plain
        for argument, value in arguments.items()
        if argument not in _COUNTERS_OF_SCHEDULERS
        for name, plain in settings(value, f"{key}.{argument}").items()
    }


def _in_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return arguments of an optimiser that its groups have alone, as where it is made of two."""
    known = inspect.signature(type(optimizer)).parameters.keys() - {"params"}
    values = {name: value for group in groups for name, value in group.items()}
    alone = sorted((known - optimizer.defaults.keys()) & values.keys())
    return {name: values[name] for name in alone}


def check_adapter(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UsageError where an adapter of the same shapes is scaled in another way."""
    # Not by `changes`, which compares nothing below another algorithm's class.
    before, now = old.get(_ALPHA), new.get(_ALPHA)
    if None not in (before, now) and before != now:
        raise UsageError(
            f"the checkpoint was trained with a LoRA of alpha {before}, not {now}; set "
            f"model.init_args.lora.alpha to {before}"
        )


def check_same_run(old: Mapping[str, Any], algorithm: str) -> None:
    """Raise UsageError where a fit would go on with another algorithm."""
    before = old.get("algorithm", algorithm)
    if before != algorithm:
        raise UsageError(
            f"the checkpoint is of a run of {before}, which {algorithm} cannot go on with; resume "
            f"with {before}, or start a run of {algorithm} under another name"
        )


def num_train_rows(trainer: Trainer | None) -> int | None:
    """Return the number of rows that a fit trains on, once it has its loaders; None if unknown."""
    loader: Any = None if trainer is None else trainer.train_dataloader
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def check_same_batches(
    checkpoint: Mapping[str, Any],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    data: Any,
) -> None:
    """Raise UsageError in the middle of an epoch where it would go on at another place in the data.

    The place is a number of batches of an order of all rows. At the end of an epoch other sizes
    apply from the next one on.

    Args:
        checkpoint: Of the run.
        old: Its settings.
        new: The settings now.
        data: DataModule of the fit; the rows of others than `SplitData` are not compared.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["completed"]
    if not done or progress["is_last_batch"]:
        return
    size, now = old.get(_BATCH), new.get(_BATCH)
    middle = "the checkpoint lies in the middle of an epoch, after"
    until = "until that epoch has ended, or resume from a checkpoint at an epoch's end"
    if None not in (size, now) and size != now:
        raise UsageError(
            f"{middle} {done} batches of {size} rows, and data.init_args.batch_size is {now}; set "
            f"it to {size} {until}"
        )
    before = checkpoint["lit_rlft"].get("num_train_rows")
    if before is None or not isinstance(data, SplitData):
        return
    rows = len(data.rows("train"))  # type: ignore[arg-type]
    if before != rows:
        raise UsageError(
            f"{middle} {done} batches of data of {before} rows, and the training data have {rows} "
            f"now; give them {before} rows {until}"
        )


def check_optimizer(
    checkpoint: Mapping[str, Any], old: Mapping[str, Any], optimizer: Optimizer, scheduler: Any
) -> None:
    """Check that the checkpoint's states are those of this optimiser and schedule.

    Raises:
        UsageError: They are of other classes, other groups of parameters, or only one side has a
            schedule.
    """
    new = optimizer_settings(optimizer, scheduler)
    states = checkpoint["optimizer_states"]
    groups = states[0].get("param_groups", []) if len(states) == 1 else []
    sizes = [len(group["params"]) for group in groups]
    same = sizes == [len(group["params"]) for group in optimizer.param_groups]
    fields = groups and not (groups[0].keys() ^ optimizer.param_groups[0].keys()) - _OF_A_SCHEDULE
    if old.get(OPTIMIZER, new[OPTIMIZER]) != new[OPTIMIZER] or not same or not fields:
        before = _short(old.get(OPTIMIZER, "another optimiser"))
        raise UsageError(
            f"the checkpoint holds the state of {before} over groups of {sizes} parameters, which "
            f"{_short(new[OPTIMIZER])} cannot go on with; set model.init_args.optimizer to that of "
            "the run"
        )
    schedules = checkpoint["lr_schedulers"]
    if bool(schedules) != (scheduler is not None):
        had, has = ("a", "none") if schedules else ("no", "one")
        raise UsageError(
            f"the checkpoint's run had {had} learning-rate schedule and this one has {has}; set "
            "model.init_args.lr_scheduler to that of the run"
        )
    schedule, now = old.get(SCHEDULER), new[SCHEDULER]
    if schedule is not None and schedule != now:
        raise UsageError(
            f"the checkpoint holds the state of {_short(schedule)}, not of {_short(now)}; set "
            "model.init_args.lr_scheduler to that of the run"
        )


def list_changes(
    checkpoint: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    optimizer: Optimizer,
    scheduler: Any,
) -> None:
    """Say in one line which settings differ from the run's, and make the new ones apply.

    Args:
        checkpoint: Of the run; its states of optimiser and schedule are changed.
        old: Its settings; None for a checkpoint of an older version.
        new: The settings now.
        optimizer: Has them.
        scheduler: Has them; None for a constant rate.
    """
    if old is None:
        rank_zero_info(
            "resuming from a checkpoint of an older version, which does not name its settings: "
            "they are not compared"
        )
        return
    before = checkpoint["optimizer_states"][0]["param_groups"]
    # Of arguments that earlier versions did not name.
    old = {**_named(_in_groups(optimizer, before), OPTIMIZER), **old}
    found = [
        one
        for one in changes(old, new)
        if not _under(one[0], _WITHOUT_EFFECT) and not one[0].startswith(f"{SCHEDULER}.")
    ]
    if scheduler is not None:
        schedule_state.advance(scheduler, checkpoint["lr_schedulers"][0])
        given = _below(old, SCHEDULER), _below(new, SCHEDULER)
        other_rate = any(key == f"{OPTIMIZER}.lr" for key, *_ in found)
        made = (optimizer, scheduler)
        found += schedule_state.schedule_changes(checkpoint, given, *made, other_rate=other_rate)
    if found:
        rank_zero_info(f"resuming with other settings: {_listed(sorted(found))}")
    _take_new(checkpoint, {key: value for key, value, _ in found}, optimizer, scheduler)


def _below(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name.startswith(f"{key}.")}


def list_of_samples(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in one line with what other settings samples are drawn and judged than in the fit.

    Args:
        old: Settings of the fit, from its checkpoint.
        new: The settings now.

    Returns:
        The settings; nothing where they are the same.
    """
    found = [one for one in changes(old, new) if _under(one[0], _OF_SAMPLES)]
    found = [
        one
        for one in found
        if not _under(one[0], _WITHOUT_EFFECT) and _OF_MEANS.isdisjoint(one[0].split("."))
    ]
    if listed := _listed(found):
        rank_zero_info(f"drawing with other settings than the fit had: {listed}")
    return listed


def _listed(found: Sequence[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{key} {_short(before)} -> {_short(now)}" for key, before, now in found)


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _take_new(
    checkpoint: Mapping[str, Any], before: Mapping[str, Any], optimizer: Optimizer, scheduler: Any
) -> None:
    """Make the new settings of optimiser and schedule apply in a checkpoint.

    Args:
        checkpoint: Of the run; changed.
        before: Old values of the settings that differ.
        optimizer: Has the new ones.
        scheduler: Has the new ones, and has come as far as that of the run; None where there is
            none.
    """
    names = {key.split(".")[2] for key in _below(before, OPTIMIZER)}
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    rate, scale = before.get(f"{OPTIMIZER}.lr"), None if "lr" in names else 1.0
    if isinstance(rate, int | float) and rate:
        scale = optimizer.defaults["lr"] / rate
    for name in names - {"lr"}:
        for group, now in zip(groups, optimizer.param_groups, strict=True):
            if name in now:
                group[name] = now[name]
    if scheduler is None:
        for group, now in zip(groups, optimizer.param_groups, strict=True):
            group |= {"lr": now["lr"]} if "lr" in names else {}
        return
    cycled = names & {"betas", "momentum"} and "max_momentum" in optimizer.param_groups[0]
    if "lr" in names or cycled or _below(before, SCHEDULER):
        schedule_state.adopt(checkpoint, optimizer, scheduler, scale)


def _short(value: Any) -> str:
    """Return a value as a person says it: a class without its module."""
    text = str(value)
    parts: Sequence[str] = text.split(".")
    plain = isinstance(value, str) and len(parts) > 1 and all(p.isidentifier() for p in parts)
    return parts[-1] if plain else text
