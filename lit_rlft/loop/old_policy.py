"""A second set of the trained weights, which follows them: the policy that samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_rlft.core.checks import UsageError
from lit_rlft.distributed import own_part, split_like, to_save

__all__ = ["OldPolicy"]


class OldPolicy:
    """The weights of a policy that lags behind the trained one; of a LoRA, those of the LoRA alone.

    It starts where training does. Its state is part of checkpoints. Where the trained weights are
    split among processes it is split likewise. It has single precision at least: in half precision
    it would stop following, short of the trained weights.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    @contextmanager
    def active(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the trained parameters hold this policy's weights, without gradients.

        Nothing is copied, except to half precision, and no graph that was built before notices.
        Only the parts of split weights are written over, and their graphs must have run backward
        before.

        Args:
            trained: The trained parameters by name, not gathered.
        """
        own = self._weights_of(trained)
        with torch.no_grad(), ExitStack() as stack:
            for parameter, weight in zip(trained.values(), own, strict=True):
                _lend(parameter, weight.to(parameter.dtype), stack)
            yield

    def follow(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        """Move to decay old + (1 - decay) trained.

        Args:
            trained: The trained parameters by name.
            decay: In [0, 1]; 0 takes the trained weights as they are.
        """
        for own, parameter in zip(self._weights_of(trained), trained.values(), strict=True):
            own_part(own).lerp_(own_part(parameter.detach()).to(own.dtype), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name; none before the first use. All processes must call this."""
        return {name: to_save(weight) for name, weight in self._weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights that `state_dict` returned."""
        self._weights = {name: weight.clone() for name, weight in state.items()}

    def _weights_of(self, trained: Mapping[str, nn.Parameter]) -> Sequence[Tensor]:
        """Return the weights on the devices of the trained ones; those as they are at first."""
        if not self._weights:
            self._weights = {
                name: p.detach().to(_precise(p), copy=True) for name, p in trained.items()
            }
        if self._weights.keys() != trained.keys():
            raise UsageError(
                "the checkpoint's sampling policy has other weights than this model trains; use "
                "the lora settings (rank, targets) of the run"
            )
        for name, parameter in trained.items():
            own = split_like(self._weights[name], parameter)
            self._weights[name] = own.to(parameter.device, _precise(parameter))
        return [self._weights[name] for name in trained]


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _lend(parameter: nn.Parameter, weight: Tensor, stack: ExitStack) -> None:
    """Give a parameter other numbers until the stack is closed."""
    if not isinstance(parameter, DTensor):
        stack.callback(setattr, parameter, "data", parameter.data)
        parameter.data = weight
        return
    place = own_part(parameter)  # FSDP gathers from this storage
    stack.callback(place.copy_, place.clone())
    place.copy_(own_part(weight))
