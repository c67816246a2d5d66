"""Rectified flows that were saved with a model of text and pictures, as its pipeline steps them."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.saved_grids import SavedFlow, SolvedFlow
from lit_rlft.kit.schedulers import FLOW_SOLVERS, KEY, SOLVED_FLOWS, check_options

__all__ = ["empirical_mu", "flow_process", "flow_timestep"]

_CLASS = "FlowMatchEulerDiscreteScheduler"
_LARGE = 4300
"""Tokens of pictures whose shift does not depend on the number of steps, in FLUX.2."""


def flow_process(
    scheduler: Any,
    family: str,
    num_tokens: int | None,
    *,
    own_grid: bool,
    logit_normal: tuple[float, float] | None = None,
    mu_of: Callable[[int], float] | None = None,
) -> GaussianProcess:
    """Return the process of a flow scheduler: velocity prediction, the scheduler's time shift.

    Where a solver was saved for the flow, one line says that Euler steps stand in for its own.

    Args:
        scheduler: One of diffusers' schedulers, as a pipeline of diffusers holds it.
        family: The model's family, for messages.
        num_tokens: Tokens of a picture, which a dynamic shift depends on; None where the family's
            pipeline passes none.
        own_grid: Whether the family's pipeline leaves the grid to the scheduler, which spaces the
            levels evenly down to its smallest one; otherwise the pipeline itself spaces them evenly
            down to 1 / num_steps. Solvers are known where it does.
        logit_normal: Mean and standard deviation of the logit of the times that the family was
            trained at, before the shift; None for uniform ones.
        mu_of: What the family's pipeline passes for the dynamic shift of a grid of so many steps;
            None is linear in the number of tokens, as that of training times is in any case.

    Raises:
        UsageError: The scheduler is of another class, or has an option that is not supported.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if own_grid and kind in FLOW_SOLVERS and config.get("use_flow_sigmas"):
        return _solved(scheduler, kind, logit_normal)
    if kind != _CLASS:
        raise UsageError(
            f"{KEY}: the scheduler is {kind}, but {family} is sampled as a rectified flow here; "
            f"put a {_CLASS} into the folder's scheduler"
        )
    shifted = num_tokens is not None
    check_options(kind, config, supplied=("use_dynamic_shifting",) if shifted else ())
    dynamic = config.get("use_dynamic_shifting", False)
    mu = _mu(config, num_tokens) if dynamic and num_tokens is not None else None
    flow = SavedFlow(
        scheduler,
        mu=mu,
        own_grid=own_grid,
        logit_normal=logit_normal,
        mu_of=None if mu is None else mu_of,
    )
    return GaussianProcess(flow, "velocity")


def _solved(scheduler: Any, kind: str, logit_normal: tuple[float, float] | None) -> GaussianProcess:
    check_options(kind, scheduler.config, SOLVED_FLOWS)
    rank_zero_info(
        f"the model's {kind} is a solver of its own: Euler steps on its timesteps and noise levels "
        "stand in for it"
    )
    return GaussianProcess(SolvedFlow(scheduler, logit_normal), "velocity")


def flow_timestep(process: GaussianProcess, t: Tensor) -> Tensor:
    """Return what a network is told at times [B] of a process that `flow_process` made."""
    schedule = process.schedule
    assert isinstance(schedule, SavedFlow | SolvedFlow)
    return schedule.timestep(t)


def _mu(config: Mapping[str, Any], num_tokens: int) -> float:
    """Return what a dynamic shift is computed from: linear in the number of tokens."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (num_tokens - few) / (many - few)


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """Return what FLUX.2's dynamic shift is computed from.

    It is linear in the number of tokens at 10 and at 200 steps, and linear in the number of steps
    between and beyond them; for large pictures it is that of 200 steps.

    References:
        https://github.com/black-forest-labs/flux2 (`compute_empirical_mu`)
    """
    many = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > _LARGE:
        return many
    few = 8.73809524e-05 * num_tokens + 1.89833333
    return many + (few - many) * (200 - num_steps) / 190
