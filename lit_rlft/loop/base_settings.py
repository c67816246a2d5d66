"""The checks of the settings that all algorithms share."""

from typing import Any

from torch import Tensor

from lit_rlft.core.batch_size import AUTO
from lit_rlft.core.checks import BadArgument, UsageError, at_least, one_of, positive, require
from lit_rlft.core.contract import check_networks
from lit_rlft.core.process import Process
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import described

__all__ = ["check_sampler", "check_settings"]


def check_settings(owner: Any) -> None:
    """Raise UsageError where the pipeline or a setting of `RewardFineTuner`'s own is impossible.

    Args:
        owner: Has them as attributes.
    """
    check_networks(owner.pipeline)
    for name in ("num_epochs", "minibatch_size", "num_eval_samples", "best_of", "seed"):
        require(getattr(owner, name) is not None, owner, name, "a whole number, not null")
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


def check_sampler(sampler: Sampler, process: Process) -> None:
    """Raise UsageError where a process lacks the sampler's kind of noise, or has no right grid."""
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
    holds = sampler.transition == "eta" or process.has_sde
    rule = "whose states follow no differential equation; set it, and sampler.eta to 1"
    require(holds, sampler, "transition", f"eta for a {type(process).__name__}, {rule}")
