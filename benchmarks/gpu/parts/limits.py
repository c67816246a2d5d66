"""What the device reaches at most: products of matrices, and copies of memory."""

from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench, Row

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Multiply square matrices in bf16, fp32 and TF32; copy a large tensor."""
    size = bench.pick(8192, 64)
    bench.case({"what": "bf16"}, lambda: _product(bench, size, torch.bfloat16, tf32=False))
    bench.case({"what": "fp32"}, lambda: _product(bench, size // 2, torch.float32, tf32=False))
    bench.case({"what": "TF32"}, lambda: _product(bench, size, torch.float32, tf32=True))
    bench.case({"what": "copy"}, lambda: _copy(bench, bench.pick(2**30, 2**12)))


def _product(bench: Bench, size: int, dtype: torch.dtype, *, tf32: bool) -> Row:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        number = bench.pick(10, 1)
        found = bench.turns({"": _times(number, lambda: torch.mm(a, b))})[""]
    finally:
        torch.set_float32_matmul_precision(before)
    return {**found, "size": size, "flops": number * 2 * size**3}


def _copy(bench: Bench, size: int) -> Row:
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    found = bench.turns({"": _times(10, lambda: target.copy_(source))})[""]
    return {**found, "bytes": 10 * 2 * size}  # read and written


def _times(number: int, call: Callable[[], object]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(number):
            call()

    return several
