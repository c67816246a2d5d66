"""What a run spends: denoiser and reward calls, FLOPs, seconds, memory."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.state import batch_size

if sys.platform != "win32":
    import resource

__all__ = [
    "Cost",
    "count_calls",
    "count_flops",
    "flop_counter",
    "flops_per_call",
    "now",
    "peak_memory_bytes",
]

Hook = TypeVar("Hook", bound=Callable[..., Any])

_OF_A_ROUND = ("counting_seconds", "backward_flops")
_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""What attention is on a CPU, which torch's own table of formulas leaves out."""


@dataclass
class Cost:
    """Counters of one phase on this process.

    What a backward pass runs again to save memory is not counted, so that a switch for memory does
    not change what algorithms are compared by.

    Attributes:
        denoiser_calls: Rows the denoiser was evaluated on; guidance counts both its halves.
        reward_calls: Samples that were scored.
        seconds: Wall time.
        flops: Floating-point operations of the networks' forward passes, a multiplication and an
            addition being two; a backward pass takes about twice as many as its forward pass.
        prior_calls: Rows that a learned prior's network was evaluated on: a noise policy's, or a
            corrector's, once per step.
        counting_seconds: Wall time of what was run for the sake of counting `flops`.
        backward_flops: Operations of backward passes, about: of each call with a graph as many as
            of its forward pass for the gradients of activations, and as many again for those of
            the weights where all are trained.
    """

    denoiser_calls: int = 0
    reward_calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    prior_calls: int = 0
    counting_seconds: float = 0.0
    backward_flops: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters by name, without those that serve the log of one round."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_A_ROUND}


def count_calls(
    network: nn.Module,
    cost: Callable[[], Cost],
    counter: Literal["denoiser_calls", "prior_calls"] = "denoiser_calls",
) -> None:
    """Count the rows a network is evaluated on into what `cost` returns at that time."""

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if _in_backward():
            return
        spent = cost()
        setattr(spent, counter, getattr(spent, counter) + _num_rows(inputs))

    network.register_forward_pre_hook(_untraced(count))


def count_flops(network: nn.Module, cost: Callable[[], Cost]) -> None:
    """Count a network's operations into what `cost` returns at that time.

    They are measured in an extra call, without gradients and in evaluation mode, before the first
    call with inputs of new shapes or with an adapter newly switched on or off. From then on they
    are known for any number of rows, since each row costs the same. The cost of the extra call, and
    of anything else that only a first call does, is not counted.
    """
    adapters = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    known: dict[tuple[Any, ...], Fraction] = {}
    backward: dict[bool, Fraction] = {}
    bills: dict[tuple[Any, ...], tuple[int, int]] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        switched_off = bool(adapters) and adapters[0].disable_adapters
        if _in_backward() or not (rows := _num_rows(args)):
            return
        key = (switched_off, *_shapes((args, kwargs), rows))
        if key not in known:
            started = now()
            known[key] = Fraction(_measured(module, args, kwargs), rows)
            cost().counting_seconds += now() - started
            backward.setdefault(switched_off, _backward_share(module, switched_off))
        if (rows, key) not in bills:  # fractions are slow
            flops = round(known[key] * rows)
            bills[rows, key] = (flops, round(flops * backward[switched_off]))
        spent, (flops, backwards) = cost(), bills[rows, key]
        spent.flops += flops
        if torch.is_grad_enabled():
            spent.backward_flops += backwards or flops * _wanted((args, kwargs))

    network.register_forward_pre_hook(_untraced(count), with_kwargs=True)


def _in_backward() -> bool:
    """Return whether a backward pass runs something again that it did not keep."""
    return torch._C._current_graph_task_id() != -1


def _backward_share(network: nn.Module, switched_off: bool) -> Fraction:
    """Return the operations of a backward pass over those of its forward pass, about.

    Args:
        network: Of the pass.
        switched_off: Whether its adapter, which alone is trained, has no part in it.
    """
    numbers, trained = 0, 0
    for parameter in network.parameters():
        numbers += parameter.numel()
        trained += parameter.numel() * parameter.requires_grad
    return Fraction(numbers + trained, numbers) if trained and not switched_off else Fraction(0)


def _wanted(inputs: Any) -> bool:
    """Return whether a backward pass goes through a frozen network to its inputs."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))


def _untraced(hook: Hook) -> Hook:
    """Return a hook that torch.compile leaves alone: traced, it would break graphs apart."""
    untraced: Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return untraced


def _measured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the operations of a call; it draws no noise and leaves no trace."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    # Cut off their graphs: torch's counter fails on leaves that want gradients.
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    try:
        with flop_counter() as counter, torch.no_grad():
            module.forward(*args, **kwargs)  # not the module itself, whose hooks have run
    finally:
        for part, training in modes:
            part.training = training
        # Older torch keeps the casts of weights made here, without gradients, for the call itself.
        torch.clear_autocast_cache()
    return int(counter.get_total_flops())


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count operations with torch's counter, which also knows attention on a CPU here.

    Compiled networks run as they were before: the counter does not see compiled operations.
    """
    attention = getattr(torch.ops.aten, _CPU_ATTENTION, None)
    formulas = {} if attention is None else {attention: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.compiler.set_stance("force_eager"), counter:
        yield counter


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the operations of attention among shapes [B, heads, tokens, width]."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def flops_per_call(pipeline: Pipeline, condition: Condition) -> int:
    """Return the floating-point operations of the denoiser on one row, at the model's own size."""
    one = condition.index(slice(0, 1))
    x = pipeline.process.prior(pipeline.blank(one)).sample()
    t = torch.ones(1, dtype=torch.float64, device=pipeline.device)
    with flop_counter() as counter, torch.no_grad():
        pipeline.predict(x, t, one)
    return int(counter.get_total_flops())


def _num_rows(inputs: tuple[Any, ...]) -> int:
    """Return the number of rows of a network's first argument: a state, or a list of its rows."""
    first = inputs[0]
    return len(first) if isinstance(first, list) else batch_size(first)


def _shapes(value: Any, rows: int) -> Iterator[tuple[int, ...]]:
    """Iterate over the shapes of the tensors in a tree of arguments, but for the number of rows.

    A list of rows of several lengths counts as the longest: networks fill the others up to it.
    """
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        yield (-1, *shape[1:]) if shape[:1] == (rows,) else shape
    elif isinstance(value, list) and _are_rows(value, rows):
        yield (-1, *map(max, zip(*(part.shape for part in value), strict=True)))
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _shapes(value[name], rows)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _shapes(part, rows)


def _are_rows(parts: list[Any], rows: int) -> bool:
    """Return whether a list has a tensor for each row, of as many dimensions."""
    tensors = all(isinstance(part, Tensor) for part in parts)
    return tensors and len(parts) == rows and len({part.dim() for part in parts}) == 1


def now() -> float:
    """Return a clock's seconds, after waiting for all work begun on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run on after their calls have returned
    return time.monotonic()


def peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocated memory, or of the process's memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
