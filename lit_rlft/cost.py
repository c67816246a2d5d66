"""What a run spends: denoiser and reward calls, FLOPs, seconds, memory."""

import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_rlft.core.pipeline import Condition, Pipeline

__all__ = ["Cost", "count_calls", "flops_per_call", "peak_memory_bytes"]


@dataclass
class Cost:
    """Counters of one phase on this process.

    Attributes:
        denoiser_calls: Rows the denoiser was evaluated on; guidance counts both its halves.
        reward_calls: Samples that were scored.
        seconds: Wall time.
    """

    denoiser_calls: int = 0
    reward_calls: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters by name."""
        return asdict(self)


def count_calls(denoiser: nn.Module, cost: Callable[[], Cost]) -> None:
    """Count the rows the denoiser is evaluated on into whatever `cost` returns at that time."""

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        first = inputs[0]
        rows = first if isinstance(first, Tensor) else next(iter(first.values()))
        cost().denoiser_calls += rows.shape[0]

    denoiser.register_forward_pre_hook(count)


def flops_per_call(pipeline: Pipeline, condition: Condition) -> int:
    """Return the floating-point operations of the denoiser on one row, at the model's own size."""
    one = condition.index(slice(0, 1))
    x = pipeline.process.prior(pipeline.blank(one)).sample()
    t = torch.ones(1, dtype=torch.float64, device=pipeline.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.predict(x, t, one)
    return int(counter.get_total_flops())


def peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocated memory, or of the process's memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
