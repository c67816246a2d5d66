"""Gradient checkpointing of a network's blocks: computed again in the backward pass, not kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_rlft.core.checks import UsageError

__all__ = ["BlockCheckpointing", "checkpoint_blocks"]


class BlockCheckpointing:
    """A base of networks whose `forward` runs its blocks by `run`.

    Once `enable_gradient_checkpointing` was called, a block that builds a graph keeps its inputs
    alone. The backward pass computes it again, with the same random numbers and under the same
    autocast: gradients stay the same. The name of the switch is that of diffusers' networks.
    """

    gradient_checkpointing: bool = False

    def enable_gradient_checkpointing(self) -> None:
        """Keep the inputs of blocks alone from now on."""
        self.gradient_checkpointing = True

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a block makes of its inputs."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def _offering(trained: nn.Module) -> list[nn.Module]:
    """Return the networks of what is trained that can compute their blocks again."""
    networks = trained if isinstance(trained, nn.ModuleList) else [trained]
    return [one for one in networks if hasattr(one, "enable_gradient_checkpointing")]


def checkpoint_blocks(trained: nn.Module, how: str | None) -> None:
    """Switch on the checkpointing of blocks in what is trained, a network or a list of them.

    Args:
        trained: The network.
        how: "blocks"; nothing happens otherwise.

    Raises:
        UsageError: It has no such switch.
    """
    if how != "blocks":
        return
    networks = _offering(trained)
    if not networks:
        raise UsageError(
            "model.init_args.gradient_checkpointing is 'blocks', which the network "
            f"{type(trained).__name__} does not offer; set it to null, or for reward gradients to "
            "'steps'"
        )
    for network in networks:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
