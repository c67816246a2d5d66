"""What of a learning-rate schedule a resumed run takes from its checkpoint: how far it has come.

Torch writes all of a schedule into a checkpoint, its settings included, and some of them into the
groups of the optimiser. Here the constants of both are compared with those of a schedule that is
made anew; where they differ, the new schedule's apply at the place that the old one has reached.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_rlft.core.checks import UsageError
from lit_rlft.core.settings import arguments, settings
from lit_rlft.loop.settings import ABSENT

__all__ = ["KEY", "adopt", "advance", "nested", "schedule_changes"]

KEY = "model.lr_scheduler"
"""Of the schedule among the settings of a run."""
Change = tuple[str, Any, Any]
_PARTS = "_schedulers"
_WAITED = ("best", "num_bad_epochs", "cooldown_counter")
"""How far a schedule has come that waits for a plateau of one value."""
_PROGRESS = {
    *_WAITED,
    *("last_epoch", "_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial"),
    *("T_cur", "T_i", "verbose"),
}
_FUNCTIONS = ("lr_lambdas", "_scale_fn_custom")
"""What torch leaves out of a state where it is a function."""
_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
_MOMENTA = {"momentum", "betas", "max_momentum", "base_momentum"}
_IN_GROUPS = ("max_lr", "min_lr", "max_momentum", "base_momentum")
"""Constants that torch's schedules keep in the optimiser's groups alone."""


def nested(schedule: Any) -> Sequence[Any]:
    """Return the schedules that a schedule is made of."""
    return getattr(schedule, _PARTS, ())


def advance(schedule: Any, state: Mapping[str, Any]) -> None:
    """Step a fresh schedule as often as the one whose state is given.

    One that waits for a plateau stays: what it saw is not known.

    Raises:
        UsageError: It ends before that.
    """
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        return
    num_steps = _num_steps(state)
    with warnings.catch_warnings():
        # Torch warns that its optimiser was not stepped, which trains nothing here.
        warnings.simplefilter("ignore")
        try:
            for _ in range(num_steps):
                schedule.step()
        except ValueError as error:
            raise UsageError(
                f"model.init_args.lr_scheduler.init_args: the run has taken {num_steps} updates, "
                f"and the schedule ends before ({error}); make it longer"
            ) from error


def schedule_changes(
    checkpoint: Mapping[str, Any],
    given: tuple[Mapping[str, Any], Mapping[str, Any]],
    optimizer: Optimizer,
    schedule: Any,
    *,
    other_rate: bool,
) -> list[Change]:
    """Return (key, old value, new value) of a schedule's settings that differ.

    Args:
        checkpoint: Of the run.
        given: What the run's settings and the present ones name below `KEY`, by whole key.
        optimizer: Of the present settings.
        schedule: Of the present settings, as far as that of the run.
        other_rate: Whether the optimiser's own rate differs, and with it what is made of it.
    """
    state = checkpoint["lr_schedulers"][0]
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    before = _constants(schedule, state) | _in_groups(groups)
    now = _constants(schedule, schedule.state_dict()) | _in_groups(optimizer.param_groups)
    # What a state tells is taken from it, since versions named it in other ways; no state tells
    # the classes of the schedules in it.
    stated = {_name(key) for key in before.keys() | now.keys()}
    classes = {f"{KEY}.schedulers.{i}" for i in range(len(nested(schedule)))}
    classes &= given[0].keys() & given[1].keys()
    for side, named in zip((before, now), given, strict=True):
        side |= {k: v for k, v in named.items() if k in classes or _name(k) not in stated}
    found = _differing(before, now)
    # What follows from arguments is said only where none of them is known to differ.
    own = [change for change in found if _is_argument(schedule, change[0])]
    if other_rate:
        return own or [change for change in found if not change[0].endswith(".base_lr")]
    if found or not _has_functions(schedule):
        return own or found
    # Functions are in no checkpoint: they show in what they make of the rate.
    rates = groups[0]["lr"], optimizer.param_groups[0]["lr"]
    return [] if _same(*rates) else [(f"{KEY}.rate", *map(_plain, rates))]


def adopt(
    checkpoint: Mapping[str, Any], optimizer: Optimizer, schedule: Any, scale: float | None
) -> None:
    """Put a fresh schedule into a checkpoint, at the place that the run's has reached.

    Args:
        checkpoint: Of the run; states of schedule and optimiser are changed.
        optimizer: Of the present settings.
        schedule: Of the present settings, as far as that of the run.
        scale: New learning rate over old one, for a schedule that waits for a plateau: the rate
            that it has reached is no function of the number of steps. None where it is unknown.
    """
    old = checkpoint["lr_schedulers"][0]
    new = copy.deepcopy(schedule.state_dict())
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    if isinstance(schedule, ReduceLROnPlateau):
        _keep_plateau(old, new, scale, groups, optimizer)
    else:
        for group, now in zip(groups, optimizer.param_groups, strict=True):
            taken = (_RATES | _MOMENTA) & now.keys()
            group.update({name: copy.deepcopy(now[name]) for name in taken})
    checkpoint["lr_schedulers"][0] = new


def _keep_plateau(
    old: Mapping[str, Any],
    new: dict[str, Any],
    scale: float | None,
    groups: Sequence[dict[str, Any]],
    optimizer: Optimizer,
) -> None:
    same = all(old.get(name) == new.get(name) for name in ("mode", "monitor"))
    # The best of another value, or in another sense, would never be reached again.
    for name in ("last_epoch", *(_WAITED if same else ())):
        if name in old:
            new[name] = old[name]
    for group, now, least in zip(groups, optimizer.param_groups, new["min_lrs"], strict=True):
        reached = now["lr"] if scale is None else group["lr"] * scale
        group["lr"] = max(reached, min(least, now["lr"]))
    new["_last_lr"] = [group["lr"] for group in groups]


def _num_steps(state: Mapping[str, Any]) -> int:
    parts = [_num_steps(part) for part in state.get(_PARTS, ())]
    return max(0, int(state.get("last_epoch", max(parts, default=0))))


def _constants(schedule: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constants in a schedule's state, plain, by whole key."""
    return {f"{KEY}.{name}": value for name, value in _walk(schedule, state)}


def _walk(schedule: Any, state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    known = arguments(type(schedule))
    for name, value in state.items():
        if name == _PARTS:
            yield "schedulers.length", len(value)
            for i, (part, own) in enumerate(zip(nested(schedule), value, strict=False)):
                yield from ((f"schedulers.{i}.{key}", one) for key, one in _walk(part, own))
        elif name not in _PROGRESS and not (name in _FUNCTIONS and _one(value) in (None, [])):
            called = name.lstrip("_")
            plural = called not in known and called.endswith("s") and len(called) > 1
            if plural and (called[:-1] in known or called == "base_lrs"):
                called, value = called[:-1], _one(value)
            yield from settings(_plain(value), called).items()


def _in_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {n: [g[n] for g in groups if n in g] for n in _IN_GROUPS}
    return {
        key: one
        for name, values in found.items()
        if values
        for key, one in settings(_plain(_one(values)), f"{KEY}.{name}").items()
    }


def _one(values: Any) -> Any:
    """Return the value that all groups of parameters share, else all of them."""
    listed = isinstance(values, list | tuple) and len(values) > 0
    return values[0] if listed and all(_same(one, values[0]) for one in values) else values


def _plain(value: Any) -> Any:
    if isinstance(value, Counter):  # as milestones are kept
        return sorted(value.elements())
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare the arguments and attributes that both sides know, with all that is below them."""
    shared = {_name(key) for key in before} & {_name(key) for key in now}
    found: list[Change] = []
    for key in sorted(key for key in before.keys() | now.keys() if _name(key) in shared):
        within = any(key.startswith(f"{other}.") for other, *_ in found)
        values = before.get(key, ABSENT), now.get(key, ABSENT)
        if not within and not _same(*values):
            found.append((key, *values))
    return found


def _name(key: str) -> str:
    return key.removeprefix(f"{KEY}.").partition(".")[0]


def _is_argument(schedule: Any, key: str) -> bool:
    name, *rest = key.removeprefix(f"{KEY}.").split(".")
    if name == "schedulers" and len(rest) > 1:
        place = int(rest[0])
        part = nested(schedule)[place] if place < len(nested(schedule)) else None
        return rest[1] in arguments(type(part))
    return name in arguments(type(schedule))


def _has_functions(schedule: Any) -> bool:
    own = hasattr(schedule, "lr_lambdas") or getattr(schedule, "_scale_fn_custom", None) is not None
    return own or any(map(_has_functions, nested(schedule)))


def _same(first: Any, second: Any) -> bool:
    """Return whether two constants are equal, but for rounding: some are products of settings."""
    numbers = all(isinstance(one, int | float | Tensor) for one in (first, second))
    return math.isclose(first, second, rel_tol=1e-9) if numbers else bool(first == second)
