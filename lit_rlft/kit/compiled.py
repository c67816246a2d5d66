"""Networks compiled by torch, in place: names of parameters stay as they are.

The counters of calls and operations are hooks that torch does not trace (`lit_rlft.cost`).
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from lit_rlft.core.checks import UsageError

__all__ = ["How", "compile_network"]

How = Literal["blocks", "whole"]

_VARIANTS = 128
"""Compiled forms of one function at most; beyond them torch goes on without compiling.

Widths of blocks, adapters on and off, with and without gradients, one and several batch sizes.
"""


def compile_network(
    network: nn.Module, how: How, blocks: Iterable[str], backend: str = "inductor"
) -> None:
    """Have torch compile a network when it is first called.

    Args:
        network: It keeps its class and the names of its parameters. Copies are not compiled.
        how: "blocks" compiles each of the repeated blocks, which is quick since equal ones share
            their compiled form; "whole" all of the network, which may run faster.
        blocks: Names of the classes of repeated blocks.
        backend: Of torch.compile.

    Raises:
        UsageError: The network has no such blocks.
    """
    for name in ("recompile_limit", "cache_size_limit"):  # by torch's release
        limit = getattr(torch._dynamo.config, name, None)
        if limit is not None:
            setattr(torch._dynamo.config, name, max(limit, _VARIANTS))
    if how == "whole":
        network.compile(backend=backend)
        return
    known = set(blocks)
    found = [module for module in network.modules() if type(module).__name__ in known]
    if not found:
        raise UsageError(
            f"pipeline.init_args.compile: {type(network).__name__} has no blocks that are known "
            "here; set it to 'whole' or null"
        )
    for module in found:
        module.compile(backend=backend)
