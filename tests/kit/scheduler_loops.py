"""diffusers' own sampling loop, and ours, with a network that is a formula."""

import copy
import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.schedulers import saved_process

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""Stable Diffusion's table."""


def make(name: str, **options: Any) -> Any:
    """Return a scheduler with Stable Diffusion's betas, if it has any, without clipping."""
    kind = getattr(diffusers, name)
    own = inspect.signature(kind.__init__).parameters
    plain = {**SD, "clip_sample": False, "skip_prk_steps": True}
    return kind(**{k: v for k, v in plain.items() if k in own} | options)


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """Return any smooth function of a state and a time."""
    return torch.tanh(1.3 * x + timestep.double().view(-1, *[1] * (x.ndim - 1)) / 1000)


def noise(size: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 4, 4, generator=generator, dtype=torch.float64)


def theirs(scheduler: Any, num_steps: int, seed: int = 1, **step: Any) -> Tensor:
    """Sample as a pipeline of diffusers does, in double precision where the class lets it."""
    torch.manual_seed(seed)
    scheduler = copy.deepcopy(scheduler)
    for table in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, table) and "Euler" not in type(scheduler).__name__:
            setattr(scheduler, table, getattr(scheduler, table).double())
    scheduler.set_timesteps(num_steps)
    x = noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "init_noise_sigma") else x
        x = scheduler.step(network(scaled, t), t, x, **step).prev_sample.double()
    return x


def ours(scheduler: Any, num_steps: int, eta: float = 0.0, seed: int = 1) -> Tensor:
    """Sample with the process of the same scheduler."""
    torch.manual_seed(seed)
    process = saved_process(scheduler, flows=True)
    x_1 = process.prior(noise()).std * noise()
    rows = torch.zeros(len(x_1), dtype=torch.int64)
    condition = Condition(entries=[{}], tables={}, rows=rows)

    def denoiser(x: Any, t: Tensor, condition: Condition) -> Tensor:
        return network(x, timesteps(process, t))

    x_0 = Sampler(num_steps, eta).sample(denoiser, process, x_1, condition)
    assert isinstance(x_0, Tensor)
    return x_0


def timesteps(process: GaussianProcess, t: Tensor) -> Tensor:
    """Return what a network is told at times of a process."""
    tell: Any = process.schedule
    return tell.timestep(t)
