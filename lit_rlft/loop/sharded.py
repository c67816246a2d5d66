"""Networks whose weights are split among processes, block by block (FSDP2).

While samples are drawn, every process holds all weights: processes may then call the network
unequally often. While it is trained, they gather a block's weights for each of its calls and let go
of them, so all of them must make the same calls (`lit_rlft.loop.lockstep`).

References:
    PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (Zhao et al., 2023),
    https://arxiv.org/abs/2304.11277
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from lit_rlft.kit.compiled import blocks_of

__all__ = [
    "draws_whole",
    "is_sharded",
    "leaves_gradients",
    "shard",
    "split_again",
    "split_meanwhile",
    "whole_weights",
]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
_STATE = "__composable_api_state_key"
"""Under which FSDP keeps the processes, which cannot be copied."""


def is_sharded(network: nn.Module) -> bool:
    """Return whether a network's weights are split among processes."""
    return isinstance(network, FSDPModule)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Split the weights of a network among processes, in place; each moves to its device.

    Args:
        network: Its blocks (`blocks_of`) are gathered one by one, the rest of it all at once.
        mesh: The processes.
    """
    if is_sharded(network):
        return
    for part in (*blocks_of(network), network):
        part.register_forward_hook(_without_views)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _without_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return outputs that are tensors of their own: FSDP would lose track of views of others."""
    return tree_map_only(Tensor, lambda own: own.clone() if own._is_view() else own, output)


def draws_whole(network: nn.Module) -> None:
    """Gather all weights, on every process, until `split_again`; all of them must call it."""
    for part in _parts(network):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def split_again(network: nn.Module) -> None:
    """Let go of the other processes' weights; it waits for nobody."""
    for part in _parts(network):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


@contextmanager
def split_meanwhile(network: nn.Module) -> Iterator[None]:
    """Within the block a gathered network is split, so that its weights can be changed.

    Afterwards it is gathered again, for which all processes wait for each other; not after an
    error, which some of them may not have. A network that is never split stays as it is.
    """
    split_again(network)
    yield
    draws_whole(network)


@contextmanager
def leaves_gradients(network: nn.Module) -> Iterator[None]:
    """Within the block, backward passes leave gradients on their process, whole."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


@contextmanager
def whole_weights(network: nn.Module) -> Iterator[None]:
    """Within the block, a network is a plain one on the first process's CPU, to be written.

    All processes must enter it. Afterwards the network is as it was.
    """
    first = torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
    with ExitStack() as stack:
        for part in _parts(network):
            part.reshard()
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    whole = parameter.full_tensor()
                    if first:
                        plain = nn.Parameter(whole.cpu(), parameter.requires_grad)
                        stack.callback(module._parameters.__setitem__, name, parameter)
                        module._parameters[name] = plain
        for part in _parts(network) if first else []:
            _without_hooks(part, stack)
        yield


def _without_hooks(part: FSDPModule, stack: ExitStack) -> None:
    """Give a module the class it had, and nothing of FSDP's, until the stack is closed."""
    own = vars(part)
    held = {name: own[name] for name in own if name in _HOOKS or name.startswith(_STATE)}
    stack.callback(own.update, held)
    for name in held:
        del own[name]
    own.update({name: OrderedDict() for name in _HOOKS})
    stack.callback(setattr, part, "__class__", type(part))
    part.__class__ = type(part).__mro__[2]  # FSDP's subclass, FSDPModule, its own


def _parts(network: nn.Module) -> list[FSDPModule]:
    return [part for part in network.modules() if isinstance(part, FSDPModule)]
