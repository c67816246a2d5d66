"""What a network would return, without computing it."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_rlft.core.checks import loading

__all__ = ["output_shape"]


@torch.no_grad()
def output_shape(
    network: nn.Module, *inputs: tuple[int, ...] | Tensor, sentence: str
) -> torch.Size | None:
    """Return the shape of a network's output, which takes neither memory nor arithmetic.

    Args:
        network: Returns a tensor, or a tuple or record with the tensor first.
        inputs: Its arguments; a shape stands for float32 numbers.
        sentence: What is wrong where the network cannot be called.

    Returns:
        None where an operation of the network has no rule for shapes.

    Raises:
        UsageError: The network cannot be called with such inputs: "<sentence> (<reason>)".
    """
    tensors = chain(network.named_parameters(), network.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    arguments = tuple(
        value.to("meta") if isinstance(value, Tensor) else torch.empty(value, device="meta")
        for value in inputs
    )
    with loading(sentence):
        try:
            output = functional_call(network, shapes, arguments)
        except NotImplementedError:
            return None
    return (output if isinstance(output, Tensor) else output[0]).shape
