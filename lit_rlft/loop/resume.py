"""What a resumed run must share with the run before it, and what its user may change.

What would mix two experiments is refused. Other settings may differ: they are listed, and the
user's apply, also where torch or Lightning would take the checkpoint's without a word.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lit_rlft.core.checks import UsageError
from lit_rlft.loop.settings import changes, settings

__all__ = [
    "check_adapter",
    "check_optimizer",
    "check_same_batches",
    "check_same_run",
    "list_changes",
    "list_of_samples",
    "optimizer_settings",
]

OPTIMIZER, SCHEDULER = "model.optimizer", "model.lr_scheduler"
_ALPHA, _BATCH = "model.lora.alpha", "data.batch_size"
_COUNTERS_OF_SCHEDULERS = ("optimizer", "last_epoch")
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


def optimizer_settings(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Return the settings of an optimiser and of a learning-rate schedule, if there is one."""
    kind = type(optimizer)
    found: dict[str, Any] = {OPTIMIZER: f"{kind.__module__}.{kind.__qualname__}"}
    found |= settings(optimizer.defaults, OPTIMIZER)
    return found | settings(scheduler, SCHEDULER, _COUNTERS_OF_SCHEDULERS)


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


def check_same_batches(
    checkpoint: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Raise UsageError in the middle of an epoch, which is counted in batches of another size.

    At the end of one a new size applies from the next epoch on.
    """
    before, now = old.get(_BATCH), new.get(_BATCH)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["completed"]
    if None in (before, now) or before == now or not done or progress["is_last_batch"]:
        return
    raise UsageError(
        f"the checkpoint lies in the middle of an epoch, after {done} batches of {before} rows, "
        f"and data.init_args.batch_size is {now}; set it to {before} until that epoch has ended, "
        f"or resume from a checkpoint at an epoch's end"
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
    fields = groups and groups[0].keys() - {"initial_lr"} == optimizer.param_groups[0].keys() - {
        "initial_lr"
    }
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
    found = [one for one in changes(old, new) if not _below(one[0], _WITHOUT_EFFECT)]
    if found:
        listed = ", ".join(f"{key} {_short(a)} -> {_short(b)}" for key, a, b in found)
        rank_zero_info(f"resuming with other settings: {listed}")
    for key, before, _ in found:
        name = key.removeprefix(f"{OPTIMIZER}.").removeprefix(f"{SCHEDULER}.").partition(".")[0]
        if key.startswith(f"{OPTIMIZER}."):
            _set_in_optimizer(checkpoint, name, before, optimizer.defaults[name])
        elif key.startswith(f"{SCHEDULER}."):
            checkpoint["lr_schedulers"][0][name] = scheduler.state_dict()[name]


def list_of_samples(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in one line with what other settings samples are drawn and judged than in the fit.

    Args:
        old: Settings of the fit, from its checkpoint.
        new: The settings now.

    Returns:
        The settings; nothing where they are the same.
    """
    found = [one for one in changes(old, new) if _below(one[0], _OF_SAMPLES)]
    found = [one for one in found if not _below(one[0], _WITHOUT_EFFECT)]
    listed = ", ".join(f"{key} {_short(a)} -> {_short(b)}" for key, a, b in found)
    if listed:
        rank_zero_info(f"drawing with other settings than the fit had: {listed}")
    return listed


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _set_in_optimizer(checkpoint: Mapping[str, Any], name: str, before: Any, now: Any) -> None:
    """Change a setting in an optimiser's state; a scheduled rate keeps its place."""
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        if name != "lr" or not before:
            group[name] = now
            continue
        for rate in group.keys() & {"lr", "initial_lr"}:
            group[rate] *= now / before
    for schedule in checkpoint["lr_schedulers"] if name == "lr" and before else ():
        for rates in schedule.keys() & {"base_lrs", "_last_lr"}:
            schedule[rates] = [rate * now / before for rate in schedule[rates]]


def _short(value: Any) -> str:
    """Return a value as a person says it: a class without its module."""
    text = str(value)
    parts: Sequence[str] = text.split(".")
    plain = isinstance(value, str) and len(parts) > 1 and all(p.isidentifier() for p in parts)
    return parts[-1] if plain else text
