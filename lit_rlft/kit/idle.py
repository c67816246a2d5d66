"""Frozen networks that stay in the processor's memory while they have nothing to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["at_work", "put_away"]

_STAND_IN = "_memory_at_work"
"""Attribute of a network without weights: as many bytes, which `lit-rlft plan` weighs."""


def put_away(owner: nn.Module, name: str) -> None:
    """Make a network no part of its owner, so that it does not move with it.

    The owner keeps it under the same name.

    Args:
        owner: The module that has it.
        name: The attribute.
    """
    network = owner._modules.pop(name)
    object.__setattr__(owner, name, network)


@contextmanager
def at_work(
    network: nn.Module | None, device: torch.device, *, stays: bool = False
) -> Iterator[None]:
    """Have an idle network on the device within the block; None is for one that never leaves it.

    Args:
        network: The network.
        device: Where it works.
        stays: Whether to leave it there, for a backward pass through what it computed. Its next
            use without one takes it away.
    """
    if network is None:
        yield
        return
    weightless = any(parameter.is_meta for parameter in network.parameters())
    _come(network, device, weightless)
    try:
        yield
    finally:
        if not stays:
            _go(network, weightless)


def _come(network: nn.Module, device: torch.device, weightless: bool) -> None:
    if not weightless:
        network.to(device)
    elif _STAND_IN not in vars(network):
        tensors = [*network.parameters(), *network.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        vars(network)[_STAND_IN] = torch.empty(size, dtype=torch.uint8, device=device)


def _go(network: nn.Module, weightless: bool) -> None:
    if weightless:
        vars(network).pop(_STAND_IN, None)
    else:
        network.to("cpu")
