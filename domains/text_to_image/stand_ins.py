"""Which scheduler of diffusers takes the steps of a run's sampler, found by trying them.

A model's own scheduler may be a solver that the sampler does not run, and the sampler may draw
noise that it does not draw. Candidates walk from the same noise with the same made-up predictions
as the sampler; one whose states are the same takes the same steps.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.sampling import walk
from lit_rlft.kit.schedulers import FLOW_SOLVERS

__all__ = ["StandIn", "find_stand_in", "scheduler_facts"]

_SHAPE = (1, 1, 8, 8)
_SEED = 0
_EXACT, _NEAR = 1e-3, 0.1
"""Largest differences of states of unit scale; another solver's are above 1."""
_FLOW = "FlowMatchEulerDiscreteScheduler"
_FIRST = {"solver_order": 1, "algorithm_type": "dpmsolver++"}
_ANCESTRAL = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
_CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    *(
        ("DPMSolverMultistepScheduler", {**kind, "final_sigmas_type": end})
        for kind in (_FIRST, _ANCESTRAL)
        for end in ("zero", "sigma_min")
    ),
)
"""Classes, and the options that they get beside those of the model's own scheduler."""


@dataclass(frozen=True)
class StandIn:
    """A scheduler of diffusers that takes a sampler's steps.

    Attributes:
        name: Its class.
        options: What it gets beside the config of the model's own.
        exact: Whether its steps are the sampler's up to rounding; otherwise nearly so.
    """

    name: str
    options: dict[str, Any]
    exact: bool


def scheduler_facts(
    scheduler: Any, process: GaussianProcess, steps: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what lit_rlft.json says of the schedulers of a tuned model.

    `model` is the class of its own. `class` and `options` are of the one that takes the sampler's
    steps, `exact`ly or nearly so; no class takes others than DDIM(eta)'s.

    Args:
        scheduler: The model's own.
        process: What the sampler walks, made of that scheduler.
        steps: `num_steps`, and what else the sampler's settings are.
    """
    eta = steps.get("eta", 0.0)
    known = eta == 0 or (steps.get("transition", "eta") == "eta" and "noisy_steps" not in steps)
    found = find_stand_in(scheduler, process, steps["num_steps"], eta) if known else None
    told: dict[str, Any] = {"model": type(scheduler).__name__, "class": None}
    if found is not None:
        told |= {"class": found.name, "options": found.options, "exact": found.exact}
    return told


def find_stand_in(
    scheduler: Any, process: GaussianProcess, num_steps: int, eta: float
) -> StandIn | None:
    """Return the scheduler of diffusers that takes a sampler's steps, None where none does.

    The model's own comes first.

    Args:
        scheduler: The model's own.
        process: What the sampler walks, made of that scheduler.
        num_steps: Of the sampler.
        eta: Noise of its steps.
    """
    own = type(scheduler).__name__
    if own == _FLOW:  # no scheduler of diffusers draws DDIM(eta)'s noise for a flow
        return StandIn(own, {}, exact=True) if eta == 0 else None
    process = copy.deepcopy(process).to("cpu")
    expected = list(_ours(process, num_steps, eta))
    best: tuple[float, StandIn] | None = None
    candidates = _CANDIDATES
    if own in FLOW_SOLVERS and process.prediction_type == "velocity":
        candidates = tuple(("DPMSolverMultistepScheduler", kind) for kind in (_FIRST, _ANCESTRAL))
    for name, options in ((own, {}), *candidates):
        try:
            kind = getattr(diffusers, name)
            tried = kind.from_config(scheduler.config, **options)
            off = _difference(expected, _theirs(tried, num_steps, eta), num_steps)
        except Exception:  # of any kind: it has no such steps, and the export goes on
            continue
        if best is None or off < best[0]:
            best = off, StandIn(name, options, off <= _EXACT)
        if off <= _EXACT:
            break
    return None if best is None or best[0] > _NEAR else best[1]


def _predicted(i: int, x: Tensor) -> Tensor:
    """Return a prediction of step i that depends on the state, as a denoiser's does."""
    noise = torch.Generator().manual_seed(1 + i)
    return 0.9 * torch.randn(x.shape, generator=noise) + 0.3 * x


@torch.no_grad()
def _ours(process: GaussianProcess, num_steps: int, eta: float) -> Iterator[tuple[float, Tensor]]:
    """Iterate over what the sampler tells the denoiser: timesteps and states; last comes x_0."""
    noise = [torch.Generator().manual_seed(_SEED)]
    x_1 = process.prior(torch.zeros(_SHAPE)).sample(noise)
    seen: list[tuple[float, Tensor]] = []
    schedule: Any = process.schedule

    def denoiser(x: Any, t: Tensor, condition: Any) -> Tensor:
        seen.append((float(schedule.timestep(t)[0]), x))
        return _predicted(len(seen) - 1, x)

    nothing: Any = None
    times, ends = process.times(num_steps), process.ends(num_steps)
    *_, (_, x_0) = walk(denoiser, process, x_1, nothing, times, eta, noise, ends)
    assert isinstance(x_0, Tensor)
    yield from [*seen, (-1.0, x_0)]


@torch.no_grad()
def _theirs(scheduler: Any, num_steps: int, eta: float) -> Iterator[tuple[float, Tensor]]:
    """Iterate over the same as a pipeline of diffusers tells the denoiser."""
    scheduler.set_timesteps(num_steps)
    noise = torch.Generator().manual_seed(_SEED)
    x = torch.randn(_SHAPE, generator=noise) * scheduler.init_noise_sigma
    given = {"generator": noise, "eta": eta}
    known = inspect.signature(scheduler.step).parameters
    given = {name: value for name, value in given.items() if name in known}
    for i, t in enumerate(scheduler.timesteps):
        told = scheduler.scale_model_input(x, t)
        yield float(t), told
        x = scheduler.step(_predicted(i, told), t, x, return_dict=False, **given)[0]
    yield -1.0, x


def _difference(
    ours: list[tuple[float, Tensor]], theirs: Iterator[tuple[float, Tensor]], num_steps: int
) -> float:
    """Return the largest difference of states; infinite where timesteps are others."""
    largest, met = 0.0, 0
    for (t, x), (own_t, own_x) in zip(ours, theirs, strict=False):
        if abs(t - own_t) > 0.5:
            return float("inf")
        largest, met = max(largest, float((x - own_x).abs().max())), met + 1
        if not largest <= _NEAR:
            return float("inf")
    return largest if met == num_steps + 1 else float("inf")
