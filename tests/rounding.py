"""The rounding of another processor, imitated: `LIT_RLFT_TEST_ROUNDING=1 python -m pytest ...`.

Products, sums and transcendental functions may differ in their last bit between two rows of one
batch, two batch sizes and two processors: vector units, the remainder of a vector and libraries
round in their own ways. The same computation repeated on one machine gives the same bits. Tests
may rely on that alone. In this mode every such result moves by up to one unit in the last place, in
a direction that depends on the place in the tensor and on the shape; a test that fails here alone
asserts what another processor need not keep.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ROUNDED = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.mv,
    aten.addmv,
    aten.dot,
    aten.convolution,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_attention_math,
    aten.exp,
    aten.expm1,
    aten.log,
    aten.log1p,
    aten.sin,
    aten.cos,
    aten.tan,
    aten.atan2,
    aten.acos,
    aten.tanh,
    aten.sigmoid,
    aten.silu,
    aten.gelu,
    aten.softplus,
    aten.erf,
    aten.erfinv,
    aten.pow,
    aten.rsqrt,
    aten.lerp,
    aten.addcmul,
    aten.addcdiv,
    aten._softmax,
    aten._log_softmax,
    aten.logsumexp,
    aten.sum,
    aten.mean,
    aten.var,
    aten.std,
    aten.linalg_vector_norm,
    aten.cumsum,
    aten._cdist_forward,
}


class OtherRounding(TorchDispatchMode):
    """Moves float32 and float64 results by one unit in the last place, by place and shape."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in ROUNDED or func._schema.is_mutable:
            return out
        if isinstance(out, tuple):
            return (_moved(out[0]), *out[1:])
        return _moved(out)


def _moved(value: Tensor) -> Tensor:
    if value.dtype not in (torch.float32, torch.float64):
        return value
    # Sums of a few small integers and exp(0) are exact everywhere.
    exact = value * 8 == (value * 8).round()
    return value.where(exact, value * _factors(value.shape, value.dtype))


@cache
def _factors(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    places = torch.arange(shape.numel()) + shape.numel()
    direction = (places * 2654435761 >> 7) % 3 - 1
    return (1 + direction * torch.finfo(dtype).eps).to(dtype).view(shape)
