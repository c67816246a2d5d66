"""A device that is not the CPU, on machines that have no other: `torch.device("second")`.

Tests on CPUs cannot see where code mixes devices, such as `rows[torch.arange(n)]` read from a
tensor on the CPU by one that lies on a GPU. `SecondTensor` says that it lies on `second:0`, holds a
tensor of the CPU, and computes with that; before, it refuses what CUDA would:

- an operation on it and on a tensor of the CPU, unless that one has no dimensions and the operation
  goes element by element, or it is an index into this one;
- a tensor of the CPU indexed by it, or written into from it other than by `copy_`;
- a generator of the CPU for numbers on it;
- `numpy()`, which torch itself refuses.

`second_device` registers it as torch's own spare device ("PrivateUse1"), so `device=`, `to`, the
modules, autograd with its thread for each device and Lightning treat it like any other. Random
numbers are those of the CPU: the same computation on both devices has the same results.

It cannot see what asks for CUDA by name (`device.type == "cuda"`: pinned memory, TF32, autocast),
and checks neither kernels that exist on one device alone nor streams.
"""

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
NAME = "second"
aten = torch.ops.aten
# The first argument's place decides; these indices may lie on the CPU.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MOVING = {aten._to_copy, aten.copy_, aten.copy}
_available = False


class SecondTensor(torch.Tensor):
    """A tensor on the second device, which holds one of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        with torch.inference_mode(held.is_inference()):  # else views of other tensors fail there
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=f"{NAME}:0",
            )
        tensor.held = held
        return tensor

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return self.detach().cpu().__format__(spec)

    def __repr__(self, **_):
        return f"SecondTensor({self.detach().cpu()})"

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)  # files hold it as on the CPU

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, *args, **(kwargs or {}))


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the tensors held, after a look at where they lie."""
    if _is_composed(func):  # in inference mode torch leaves that to us
        return func.decompose(*args, **kwargs)
    given = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, SecondTensor)]
    target = torch.device(given).type if given is not None else NAME if here else "cpu"
    _check(func, args, kwargs, tensors, here, target)
    if given is not None and target == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        kwargs = {key: kwargs[key] for key in kwargs if _takes(func, key)}
    inner_args, inner = tree_map_only(SecondTensor, lambda tensor: tensor.held, (args, kwargs))
    result = func(*inner_args, **inner)
    if func.overloadpacket is aten._to_copy and target == "cpu":
        return result
    if func.overloadpacket is aten.copy_:
        return args[0]
    known = {id(tensor.held): tensor for tensor in here}
    return tree_map(partial(_placed, known, target, tensors), result)


@cache
def _is_composed(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _takes(func: Any, name: str) -> bool:
    return any(argument.name == name for argument in func._schema.arguments)


def _placed(known: dict[int, Any], target: str, tensors: list[Any], value: Any) -> Any:
    """Return a result on its device; what was written in place is what was given."""
    if not isinstance(value, torch.Tensor) or target == "cpu":
        return value
    if id(value) in known:
        tensor = known[id(value)]
        assert tensor.shape == value.shape, "an operation changed a shape in place"
        return tensor
    return value if any(value is tensor for tensor in tensors) else SecondTensor(value)


def _check(
    func: Any, args: Any, kwargs: Any, tensors: list[Any], here: list[Any], target: str
) -> None:
    """Refuse an operation that mixes devices as CUDA does."""
    packet = func.overloadpacket
    generator = kwargs.get("generator")
    if target == NAME and isinstance(generator, torch.Generator):
        raise RuntimeError(f"{func}: expected a generator of {NAME}, found {generator.device.type}")
    if not here or packet in MOVING:
        return
    if packet in INDEXING and isinstance(args[0], SecondTensor):
        tensors = [args[0], *(leaf for leaf in args[2:3] if isinstance(leaf, torch.Tensor))]
    others = [tensor for tensor in tensors if not isinstance(tensor, SecondTensor)]
    lenient = torch.Tag.pointwise in func.tags or packet in INDEXING or "_foreach" in str(packet)
    scalars = lenient and all(tensor.dim() == 0 for tensor in others)
    if others and (not scalars or _writes_into(func, args, kwargs, others)):
        places = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {NAME}:0 and the "
            f"CPU (shapes {places})"
        )


def _writes_into(func: Any, args: Any, kwargs: Any, others: list[Any]) -> bool:
    """Whether an operation writes into one of these."""
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(item, kwargs[item.name]) for item in func._schema.arguments if item.name in kwargs]
    written = [leaf for item, value in given if item.is_write for leaf in tree_leaves(value)]
    return any(one is other for one in written for other in others)


class _Module:
    """What torch asks of `torch.second`."""

    is_available = staticmethod(lambda: _available)
    is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    device = staticmethod(lambda index: contextlib.nullcontext())
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    _is_in_bad_fork = staticmethod(lambda: False)


@cache
def _registered() -> torch.library.Library:
    """Make torch know the device, and make each of its factories fill it."""

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return _available

    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), Hook())
    library = torch.library.Library("aten", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        arguments = {argument.name: str(argument.type) for argument in schema.arguments}
        if not schema.name.startswith("aten::") or "device" not in arguments:
            continue
        if any("Tensor" in kind for kind in arguments.values()):
            continue
        packet = getattr(aten, schema.name.removeprefix("aten::"), None)
        func = getattr(packet, schema.overload_name or "default", None)
        if func is not None and [str(item.type) for item in schema.returns] == ["Tensor"]:
            library.impl(func, partial(run, func), "PrivateUse1")
    return library


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """Yield the second device, which only counts as available in this block."""
    global _available
    _registered()
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor builds on the CPU, then moves
    _available = True
    try:
        yield torch.device(NAME, 0)
    finally:
        _available = False
        torch._C._set_only_lift_cpu_tensors(lifts)


@contextlib.contextmanager
def trainers_on_it() -> Iterator[None]:
    """Let trainers with `accelerator="cpu"` and one process train on the second device."""
    root = property(lambda strategy: torch.device(NAME, 0))
    with (
        patch.object(SingleDeviceStrategy, "root_device", root),
        patch.object(CPUAccelerator, "setup_device", lambda accelerator, device: None),
    ):
        yield
