"""Counts of what is asked of a device: operations, and waits for it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS = {
    *("_unsafe_view", "alias", "chunk", "detach", "expand", "lift_fresh", "permute", "reshape"),
    *("select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}
NOISE = {"normal_", "rand", "rand_like", "randn", "randn_like", "uniform_"}
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}


class Operations(TorchDispatchMode):
    """Counts operations by name; views, which no kernel runs for, are left out.

    Attributes:
        found: Numbers by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self._counts and name not in _VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of operations but for draws of noise."""
        return sum(number for name, number in self.found.items() if name not in NOISE)

    @contextmanager
    def without(self, network: nn.Module) -> Iterator[None]:
        """Within the block, what a network runs is left out."""
        forward = network.forward

        def unseen(*args: Any, **kwargs: Any) -> Any:
            before, self._counts = self._counts, False
            try:
                return forward(*args, **kwargs)
            finally:
                self._counts = before

        network.forward = unseen
        try:
            yield
        finally:
            network.forward = forward


class Waits(TorchDispatchMode):
    """Lists the operations that wait for the meta device, which a rehearsal takes for a GPU.

    Attributes:
        found: Their names, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if _waits(name, tensors, args, kwargs):
            self.found.append(name)
        return func(*args, **kwargs)


def _waits(name: str, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
    if name == "_to_copy":
        device = torch.device(kwargs.get("device") or tensors[0].device)
        return _copies(tensors[0].device, device, bool(kwargs.get("non_blocking")))
    if name == "copy_":
        return _copies(tensors[1].device, tensors[0].device, len(args) > 2 and bool(args[2]))
    on_device = any(tensor.is_meta for tensor in tensors)
    masked = name == "index" and any(t.dtype == torch.bool and t.is_meta for t in tensors[1:])
    return on_device and (name in _READS or masked)


def _copies(source: torch.device, target: torch.device, non_blocking: bool) -> bool:
    """Return whether a copy waits: all from the device do, and to it unless told otherwise."""
    return source != target and (source.type == "meta" or not non_blocking)
