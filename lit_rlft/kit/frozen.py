"""Networks that judge and are never trained."""

from typing import Self, TypeVar

from torch import nn

__all__ = ["Frozen", "frozen"]

N = TypeVar("N", bound=nn.Module)


class Frozen(nn.Module):
    """A module that is always in evaluation mode, also where its trainer asks for another."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


def frozen(network: N) -> N:
    """Return the network in evaluation mode, its parameters without gradients."""
    return network.requires_grad_(False).eval()
