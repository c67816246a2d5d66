"""Networks that judge and are never trained."""

from typing import Self, TypeVar

import torch
from torch import nn

__all__ = ["Frozen", "cast_frozen", "frozen"]

N = TypeVar("N", bound=nn.Module)


class Frozen(nn.Module):
    """A module that is always in evaluation mode, also where its trainer asks for another."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


def frozen(network: N) -> N:
    """Return the network in evaluation mode, its parameters without gradients."""
    return network.requires_grad_(False).eval()


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Give frozen weights a precision in place, as a loader that reads them in it would.

    Weights with gradients stay as they are. So do buffers that are in no file: networks compute
    them in a precision of their own.

    Args:
        network: Its weights are changed, its parameters stay the same objects.
        dtype: A floating-point type.
    """
    for parameter in network.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for part in network.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                setattr(part, name, buffer.to(dtype))
