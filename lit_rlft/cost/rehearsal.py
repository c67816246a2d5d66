"""Running code on the meta device as if it were an accelerator, and weighing what it keeps.

Tensors on the meta device have shapes and no numbers. Here they stand for those on an accelerator,
those on the CPU for themselves: a copy to the CPU yields numbers, made up where none are known, so
that code which decides by values runs too. What lives on the meta device is what would fill the
accelerator's memory.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Ledger", "backward", "rehearsal", "remembered"]

_ATEN = torch.ops.aten
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
_SMALL = 100_000
"""Numbers of a tensor of integers whose values are remembered on their way to the device."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Weighs tensors while they live, and counts operations.

    Args:
        device: Kind of device whose tensors are weighed.

    Attributes:
        live: Bytes that live now.
        peaks: Most bytes that lived at once, by phase.
        flops: Floating-point operations so far, a multiplication and an addition being two.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.live, self.flops = device, 0, 0
        self.peaks: dict[str, int] = {}
        self._phases, self._whole = ["other"], False
        self._refs: dict[int, Any] = {}
        self._values: dict[int, Tensor] = {}

    @contextmanager
    def phase(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Note peaks under a name.

        Args:
            name: The phase.
            whole: Whether peaks of phases within the block count under this name too.
        """
        self._phases.append(self._phases[-1] if self._whole else name)
        outer, self._whole = self._whole, whole or self._whole
        try:
            self.note(self.live)
            yield
        finally:
            self._phases.pop()
            self._whole = outer

    def note(self, size: int) -> None:
        """Note that so many bytes lived at once."""
        phase = self._phases[-1]
        self.peaks[phase] = max(self.peaks.get(phase, 0), size)

    @contextmanager
    def apart(self) -> Iterator[Callable[[], int]]:
        """Within the block, peaks are also noted for a function that returns their maximum."""
        before, self.peaks = self.peaks, {}
        self.note(self.live)
        inner = self.peaks
        try:
            yield lambda: max(inner.values())
        finally:
            self.peaks = before
            for name, size in inner.items():
                self.peaks[name] = max(self.peaks.get(name, 0), size)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Weigh tensors that were made before."""
        for tensor in tensors:
            self._weigh(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._weigh(value)
        return out

    def _weigh(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._refs:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.live -= size
            self._refs.pop(key, None)
            self._values.pop(key, None)

        self._refs[key] = weakref.ref(storage, gone)
        self.live += size
        self.note(self.live)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the meta device, with what it takes from or hands to the CPU."""
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return self._to_host(args[0]).flatten()[0].item()
        if func is _ATEN._to_copy.default:
            return self._copied(func, args, kwargs)
        if func is _ATEN.nonzero.default and args[0].is_meta:
            shape = (args[0].numel(), args[0].dim())  # as if everything were chosen
            return torch.empty(shape, dtype=torch.int64, device="meta")
        tensors = list(_tensors((args, kwargs)))
        on_device = [tensor.is_meta for tensor in tensors]
        if not any(on_device) or (all(on_device) and func not in _INDEXING):
            return self._called(func, args, kwargs)
        if func._schema.is_mutable and not tensors[0].is_meta:
            args, kwargs = tree_map(self._to_host, (args, kwargs))
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        return self._called(func, *tree_map(_to_device, (args, kwargs)))

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except NotImplementedError:  # its shape depends on values: as it is for made-up ones
            args, kwargs = tree_map(self._to_host, (args, kwargs))
            return tree_map(_to_device, func(*args, **kwargs))

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, device = args[0], kwargs.get("device")
        if source.is_meta and device is not None and device.type != "meta":
            return self._to_host(source).to(kwargs.get("dtype") or source.dtype)
        out = func(*args, **kwargs)
        whole = not source.is_meta and out.is_meta and not source.is_floating_point()
        if whole and source.numel() <= _SMALL:
            self._values[out.untyped_storage()._cdata] = source.detach().clone()
        return out

    def _to_host(self, value: Any) -> Any:
        """Return a tensor of the device on the CPU: its values if known, else some."""
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        known = self._values.get(value.untyped_storage()._cdata)
        if known is not None and known.shape == value.shape:
            return known.to(value.dtype)
        shape = tuple(value.shape)
        if value.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        # Neither constant nor zero: advantages of equal rewards would leave nothing to train on.
        spread = torch.linspace(0.25, 0.75, max(value.numel(), 1))
        return spread[: value.numel()].reshape(shape).to(value.dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in an operation's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _to_device(value: Any) -> Any:
    mixed = isinstance(value, Tensor) and not value.is_meta and value.dim() > 0
    return value.to("meta") if mixed else value


def _without_masks(indices: Any) -> list[Any]:
    """Return indices with masks turned into numbers of rows, as if they chose everything."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.is_meta:
            numbers = torch.empty(index.numel(), dtype=torch.int64, device="meta")
            found += [numbers] * index.dim()
        else:
            found.append(index)
    return found


class _Attention(torch.autograd.Function):
    """Attention that keeps what the fused kernels keep: its inputs, its output and a sum."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = torch.empty(q.shape[:-1], device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.ledger = ledger
        ledger.flops += sdpa_flop_count(*map(_heads, (q, k, v)))  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        shapes = [_heads(x) for x in (grads[0], q, k, v)]
        ctx.ledger.flops += sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Return the shape [B, heads, tokens, width] of queries, keys or values."""
    *batch, tokens, width = x.shape
    *rows, heads = batch if batch else [1]
    return int(torch.Size(rows).numel()), heads, tokens, width


_LOWERED = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv2d, torch.matmul, torch.bmm, torch.mm,
    torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention,
}  # fmt: skip
_RAISED = {
    F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss, torch.exp,
    torch.log, Tensor.exp, Tensor.log, Tensor.pow, Tensor.sum, torch.sum, torch.pow, F.normalize,
}  # fmt: skip
"""What autocast computes in half, and in single precision (torch's lists, as far as met here)."""


class _Functions(TorchFunctionMode):
    """Attention by the fused kernels, and autocast, which the meta device has not."""

    def __init__(self, ledger: Ledger, low: torch.dtype | None) -> None:
        super().__init__()
        self.ledger, self.low, self.enabled = ledger, low, low is not None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = None
        if self.enabled and func in _LOWERED:
            wanted = self.low
        elif self.enabled and func in _RAISED:
            wanted = torch.float32
        if wanted is not None:
            args = tuple(_cast(value, wanted) for value in args)
            kwargs = {name: _cast(value, wanted) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and _on_meta(args, kwargs):
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        out = _Attention.apply(self.ledger, query, key, value)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool((args[0] if args else kwargs["query"]).is_meta)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(value, Tensor) and value.is_meta and value.is_floating_point()
    return value.to(dtype) if castable and value.dtype != torch.float64 else value


@contextmanager
def rehearsal(low: torch.dtype | None = None) -> Iterator[Ledger]:
    """Within the block, the meta device stands for an accelerator.

    Args:
        low: Half precision of autocast; None for none.
    """
    ledger = Ledger()
    functions = _Functions(ledger, low)
    with ExitStack() as stack:
        stack.enter_context(_autocast_of_meta(functions))
        stack.enter_context(functions)
        stack.enter_context(ledger)
        yield ledger


@contextmanager
def _autocast_of_meta(functions: _Functions) -> Iterator[None]:
    """Let torch's own questions about autocast be answered for the meta device too."""
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    dtype_of = torch.get_autocast_dtype

    def enabled(device_type: str | None = None) -> bool:
        if device_type == "meta":
            return functions.enabled
        return is_enabled() if device_type is None else is_enabled(device_type)

    @contextmanager
    def switched(enabled: bool) -> Iterator[None]:
        before, functions.enabled = functions.enabled, enabled and functions.low is not None
        try:
            yield
        finally:
            functions.enabled = before

    def made(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == "meta":
            return switched(kwargs.get("enabled", True))
        return autocast(device_type, *args, **kwargs)

    def dtype(device_type: str) -> torch.dtype:
        low = functions.low
        return dtype_of(device_type) if low is None or device_type != "meta" else low

    with (
        patch("torch.is_autocast_enabled", enabled),
        patch("torch.get_autocast_dtype", dtype),
        patch("torch.autocast", made),
    ):
        yield


def backward(loss: Tensor) -> None:
    """Run a backward pass of a scalar, in which a rehearsal also sees what is computed again.

    `Tensor.backward` is itself a function that modes are asked about: they are off within it.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    flags = {"allow_unreachable": True, "accumulate_grad": True}
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), **flags)


def remembered(network: nn.Module, ledger: Ledger, state: Callable[[], Any]) -> None:
    """Run a network's calls without gradients once per shape of their arguments.

    What a repeated call would cost is known: it is billed, and its outputs are new tensors.

    Args:
        network: Takes and returns tensors, in any tree that torch knows.
        ledger: Is billed.
        state: Returns what else its costs depend on, such as whether an adapter is on.
    """
    known: dict[Any, tuple[int, int, Any]] = {}
    forward = network.forward

    def replayed(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        if torch.is_grad_enabled() or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return forward(*args, **kwargs)
        key = (state(), torch.is_autocast_enabled("meta"), str(tree), *map(_looks, leaves))
        if key not in known:
            before, flops = ledger.live, ledger.flops
            with ledger.apart() as peak:
                out = forward(*args, **kwargs)
                known[key] = (peak() - before, ledger.flops - flops, tree_map(_blank, out))
            return out
        extra, flops, out = known[key]
        ledger.note(ledger.live + extra)
        ledger.flops += flops
        return tree_map(_new, out)

    network.forward = replayed


@dataclass(frozen=True)
class _Leaf:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _blank(value: Any) -> Any:
    return _Leaf(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _new(value: Any) -> Any:
    is_leaf = isinstance(value, _Leaf)
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if is_leaf else value


def _looks(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)
