"""Rectified flows that were saved with a model, as diffusers' flow scheduler describes them."""

import math
from collections.abc import Mapping
from typing import Any

from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import RectifiedFlow

__all__ = ["flow_process"]

_CLASS = "FlowMatchEulerDiscreteScheduler"
_REFUSED = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
"""Options that change the grid or the law."""


def flow_process(
    scheduler: Any, family: str, num_tokens: int, *, own_grid: bool
) -> GaussianProcess:
    """Return the process of a flow scheduler: velocity prediction, the scheduler's time shift.

    Args:
        scheduler: One of diffusers' schedulers; its `config` is read.
        family: The model's family, for messages.
        num_tokens: Tokens of a picture, which a dynamic shift depends on.
        own_grid: Whether the family's pipeline leaves the grid to the scheduler, which spaces the
            levels evenly down to its smallest one; otherwise the pipeline itself spaces them evenly
            down to 1 / num_steps.

    Raises:
        UsageError: The scheduler is of another class, or has an option that is not supported.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if kind != _CLASS:
        raise UsageError(
            f"pipeline.init_args.pretrained: the scheduler is {kind}, but {family} is sampled as a "
            f"rectified flow here; put a {_CLASS} into the folder's scheduler"
        )
    for option in _REFUSED:
        if config.get(option):
            raise UsageError(
                f"pipeline.init_args.pretrained: {kind} with {option} is not supported; set "
                f"{option} to false in scheduler/scheduler_config.json"
            )
    dynamic = config.get("use_dynamic_shifting", False)
    shift = _dynamic_shift(config, num_tokens) if dynamic else config.get("shift", 1.0)
    smallest = 1 / config.get("num_train_timesteps", 1000)
    # A fixed shift is applied to the smallest level and, in the grid, to all levels once more.
    if not dynamic:
        smallest = shift * smallest / (1 + (shift - 1) * smallest)
    schedule = RectifiedFlow(shift, last=smallest if own_grid else None)
    return GaussianProcess(schedule, "velocity")


def _dynamic_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """Return the shift that depends linearly, or by its logarithm, on the number of tokens."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (num_tokens - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
