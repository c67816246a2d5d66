"""Compiling a denoiser, or its blocks, with torch.compile; CUDA graphs of small ones."""

import shutil
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.weightless import weightless

__all__ = [
    "Compiled",
    "SmallCompiled",
    "blocks_of",
    "compile_network",
    "compile_small",
    "is_compiled",
]

Compiled = Literal["blocks", "whole"]
SmallCompiled = Literal["blocks", "whole", "graphs"]

_KEY = "pipeline.init_args.compile"
_VARIANTS = 256
"""Graphs of one block's code: its widths, with and without adapter and gradients, batch sizes."""


def compile_network(
    network: nn.Module,
    how: Compiled,
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> None:
    """Have torch compile a network in place when it is first called; no name in it changes.

    An adapter may be attached later, and switched on and off: each case is compiled once. A deep
    copy of the network is not compiled.

    Args:
        network: The denoiser.
        how: "blocks" compiles each block for itself, and blocks of the same kind and sizes once;
            "whole" compiles the network as one, which takes longer.
        backend: One of torch.compile's.
        mode: Another one of its own.
        dynamic: False compiles each batch size by itself. None compiles the first one so, and all
            others together.

    Raises:
        UsageError: There is no compiler, or the network has no blocks.
    """
    if backend == "inductor":
        _check_compiler()
    parts = [network] if how == "whole" else blocks_of(network)
    if not parts:
        raise UsageError(
            f"{_KEY}: a {type(network).__name__} has no list of blocks; set it to 'whole' or null"
        )
    import torch._dynamo  # not above: it takes a second

    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _VARIANTS)
    limit = max(torch._dynamo.config.accumulated_cache_size_limit, 4 * _VARIANTS)
    torch._dynamo.config.accumulated_cache_size_limit = limit
    for part in parts:
        part.compile(backend=backend, mode=mode, dynamic=dynamic)


def compile_small(network: nn.Module, how: SmallCompiled | None) -> None:
    """Compile a small denoiser in place as its pipeline's setting `compile` has it.

    "graphs" compiles the whole of it, for each batch size by itself, and records its kernels as
    CUDA graphs. What it returns is copied, since the next call writes to the same memory.

    Args:
        network: The denoiser.
        how: The setting; None compiles nothing, nor does anything without weights.

    Raises:
        UsageError: As `compile_network`; or CUDA graphs are asked for without a GPU.
    """
    if how is None or weightless():
        return
    if how != "graphs":
        compile_network(network, how)
        return
    if not torch.cuda.is_available():
        raise UsageError(
            f"{_KEY} is 'graphs', which records CUDA graphs, but torch finds no GPU of NVIDIA "
            "here; set it to 'whole' or null"
        )
    compile_network(network, "whole", mode="reduce-overhead", dynamic=False)
    network.register_forward_pre_hook(_untraced(_on_gpu))
    network.register_forward_hook(_untraced(_copied))


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that runs beside the compiled graph."""
    untraced: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return untraced


def _on_gpu(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    device = next(network.parameters()).device
    if device.type != "cuda":
        raise UsageError(
            f"{_KEY} is 'graphs', which records CUDA graphs, but this run is on "
            f"{device.type}; set it to 'whole' or null, or trainer.accelerator to gpu"
        )


def _copied(network: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)


def is_compiled(network: nn.Module) -> bool:
    """Return whether a network, or a part of it, is compiled."""
    return any(part._compiled_call_impl is not None for part in network.modules())


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network.

    They are those that diffusers names in `_repeated_blocks`. Without that attribute they are the
    members of the network's own lists of modules.
    """
    if names := getattr(network, "_repeated_blocks", None):
        return [part for part in network.modules() if type(part).__name__ in names]
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part]


def _check_compiler() -> None:
    """Raise UsageError where torch has nothing to compile with."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        windows = sys.platform == "win32"
        if not has_triton():
            package = "triton-windows" if windows else "triton"
            raise UsageError(
                f"{_KEY} needs Triton, which is not there or does not know this GPU; "
                f"run `pip install {package}`, or set it to null"
            )
        # Triton for Windows brings its own.
        found = windows or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    else:
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            found = get_cpp_compiler()
        except InvalidCxxCompiler:
            found = None
    if not found:
        raise UsageError(
            f"{_KEY} needs a C++ compiler and finds none; install g++ (`apt-get install g++`) or "
            "name one in the environment variable CXX, or set it to null"
        )
