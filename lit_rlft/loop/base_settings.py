"""The checks of the settings that all algorithms share."""

from inspect import signature
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, is_typeddict

import torch
from torch import Tensor

from lit_rlft.core.batch_size import AUTO
from lit_rlft.core.checks import (
    BadArgument,
    UsageError,
    at_least,
    hints,
    of_kind,
    one_of,
    positive,
    require,
)
from lit_rlft.core.contract import check_networks, check_signatures
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.process import Process
from lit_rlft.core.reward import A_REWARD, DIVERGENCE
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import Schedule
from lit_rlft.core.state import described

__all__ = ["check_kinds", "check_sampler", "check_settings"]

_NUMBERS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
}
"""What counts as an annotated kind of number, and what it is called."""
_REMEDIES = {
    "pipeline": "a lit_rlft.Pipeline",
    "reward": A_REWARD,
    "metrics": "Metrics([...])",
    "sampler": "Sampler(num_steps=...)",
    "lora": "LoRA(rank=...)",
    "optimizer": "a class or a function of parameters, such as torch.optim.AdamW",
    "lr_scheduler": "a class or a function of the optimizer",
}

_ROUNDING = 1e-6
"""How much levels may go the wrong way: tables are in single precision."""


def check_settings(owner: Any) -> None:
    """Raise UsageError where the pipeline or a setting of `RewardFineTuner`'s own is impossible.

    Args:
        owner: Has them as attributes.
    """
    check_kinds(owner)
    _check_lightnings(owner)
    check_networks(owner.pipeline)
    check_signatures(owner.pipeline, Pipeline)
    if owner.reward.name == DIVERGENCE:
        problem = f"is called {DIVERGENCE!r}, as reports call the divergence from the reference"
        raise BadArgument(owner, "reward", f"{problem}; give it another name")
    for name in ("microbatch_size", "sampling_batch_size"):
        one_of(owner, name, (AUTO,), others="a whole number")
    one_of(owner, "gradient_checkpointing", owner.checkpointing)
    at_least(1, owner, "num_epochs", "minibatch_size", "microbatch_size")
    at_least(1, owner, "sampling_batch_size", "num_eval_samples")
    positive(owner, "max_grad_norm")
    at_least(0, owner, "best_of", "seed")
    check_sampler(owner.sampler, owner.pipeline.process)
    if owner.dial is not None:
        owner.dial.check(owner.sampler.num_steps, adapted=owner.lora is not None)
    if owner.best_of and owner.reward.asks:
        name = owner.reward.name
        raise BadArgument(owner, "best_of", f"must be 0 with {name}: nobody is asked in a test")
    require(owner.best_of != 1, owner, "best_of", "0 for none, or above 1")


def _check_lightnings(owner: Any) -> None:
    """Raise UsageError for two customs of Lightning that do not apply."""
    name, method = type(owner).__name__, "configure_optimizers"
    own = next(kind for kind in type(owner).__mro__ if method in vars(kind))
    if not own.__module__.startswith("lit_rlft."):
        raise UsageError(
            f"{name}.{method}: updates and checkpoints go by the arguments optimizer and "
            "lr_scheduler instead; give them, such as optimizer=torch.optim.SGD, and leave it out"
        )
    if getattr(owner, "_compiler_ctx", None) is not None:
        raise UsageError(
            f"torch.compile({name}) would compile whole rounds, with their sampling loops; give "
            "the pipeline compile, such as compile='whole', for its denoiser alone"
        )


def check_kinds(owner: Any) -> None:
    """Raise UsageError where an attribute is of another kind than its constructor's argument.

    Arguments that are annotated as anything but classes and numbers are not looked at, nor those of
    classes of one's own, which may keep something else under an argument's name.
    """
    for name in ("optimizer", "lr_scheduler"):
        maker = getattr(owner, f"make_{name}")
        if maker is not None and not callable(maker):
            of_kind(owner, name, type, f"give {_REMEDIES[name]}", maker)
    kind: type = type(owner)
    for name, hint in hints(kind).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else hint
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        own = name in _parts_of(owner) and _taker(kind, name).__module__.startswith("lit_rlft.")
        if not own or not all(map(_is_plain, kinds)):
            continue
        value = getattr(owner, name)
        if word := next((_NUMBERS[kind][1] for kind in kinds if kind in _NUMBERS), None):
            numbers = tuple(_NUMBERS.get(kind, (kind, ""))[0] for kind in kinds)
            given = "not null" if value is None else f"got {value!r}"
            require(isinstance(value, numbers), owner, name, f"{word}, {given}")
        else:
            of_kind(owner, name, kinds, f"give {_REMEDIES.get(name, f'a {kinds[0].__name__}')}")


def _parts_of(owner: Any) -> set[str]:
    """Return the names of an object's attributes, networks included."""
    return {*vars(owner), *getattr(owner, "_modules", {})}


def _taker(kind: type, name: str) -> type:
    """Return the class whose constructor names an argument, the nearest of a class's bases."""
    makers = (base for base in kind.__mro__ if "__init__" in vars(base))
    return next(base for base in makers if name in signature(vars(base)["__init__"]).parameters)


def _is_plain(kind: Any) -> bool:
    """Return whether `isinstance` knows a kind."""
    known = isinstance(kind, type) and kind is not Any and not is_typeddict(kind)
    return known and not getattr(kind, "_is_protocol", False)


def check_sampler(sampler: Sampler, process: Process) -> None:
    """Check that a process has the sampler's kind of noise, a grid, levels and training times.

    Raises:
        UsageError: It has not, or not as tensors of the right shape and range.
    """
    num, name = sampler.num_steps, type(process).__name__
    grids: dict[str, tuple[Any, int]] = {
        "times": (process.times(num), num + 1),
        "ends": (process.ends(num), num),
    }
    for what, (grid, size) in grids.items():
        if not isinstance(grid, Tensor) or grid.shape != (size,):
            raise UsageError(
                f"{name}.{what}({num}) returned {described(grid)}; it is a tensor [{size}]"
            )
        if not 0 <= grid.min() <= grid.max() <= 1:
            raise UsageError(
                f"{name}.{what}({num}) runs from {grid[0]:g} to {grid[-1]:g}; levels lie in [0, 1]"
            )
    times = grids["times"][0]
    if (times.diff() > 0).any():
        raise UsageError(f"{name}.times({num}) increases; a sampler's levels decrease to data")
    holds = sampler.transition == "eta" or process.has_flow_steps
    rule = "whose states have no such steps; set it, and sampler.eta to 1"
    require(holds, sampler, "transition", f"eta for a {type(process).__name__}, {rule}")
    for part in process.modules():
        if isinstance(part, Schedule):
            _check_levels(part, times)
    _check_training_times(process)


def _check_levels(schedule: Schedule, times: Tensor) -> None:
    """Raise UsageError unless the signal falls and the noise rises along a decreasing grid."""
    place = next(schedule.buffers(), times).device
    t = times.flip(0).to(place).expand(2, -1)  # as a process asks for both ends of its steps
    levels: Any = schedule.levels(t)
    for name, level, sign in zip(("alpha", "sigma"), levels, (-1, 1), strict=True):
        own = f"{type(schedule).__name__}.{name}"
        fits = isinstance(level, Tensor) and level.is_floating_point() and level.shape == t.shape
        if not fits:
            raise UsageError(
                f"{own} returned {described(level)} for times {list(t.shape)}; it is a "
                "floating-point tensor of their shape"
            )
        if not level.isfinite().all():
            bad = float(t[~level.isfinite()][0])
            raise UsageError(f"{own} is not a finite number at t = {bad:g}")
        if (sign * level[0].diff() < -_ROUNDING).any():
            way = "falls" if sign > 0 else "rises"
            raise UsageError(
                f"{own} {way} with t, from {level[0, 0]:g} at t = {t[0, 0]:g} to {level[0, -1]:g} "
                f"at t = {t[0, -1]:g}; t = 0 is data and t = 1 noise"
            )


def _check_training_times(process: Process) -> None:
    """Raise UsageError unless uniform numbers are mapped to times in [0, 1], where any are."""
    like = next(process.buffers(), torch.empty(0))
    uniform = torch.tensor([0.0, 0.5, 0.99], device=like.device)
    try:
        drawn: Any = process.draw_times(uniform, low=0.0)
    except NotImplementedError:  # a process that is only sampled from
        return
    own = f"{type(process).__name__}.draw_times"
    if not isinstance(drawn, Tensor) or drawn.shape != uniform.shape:
        raise UsageError(
            f"{own} returned {described(drawn)} for 3 uniform numbers; it is a tensor [3]"
        )
    if not ((drawn >= 0) & (drawn <= 1)).all():
        raise UsageError(f"{own} returned {drawn.tolist()}; training times lie in [0, 1]")
