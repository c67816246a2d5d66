"""A second set of the trained weights, which follows them: the policy that samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError

__all__ = ["OldPolicy"]


class OldPolicy:
    """The weights of a policy that lags behind the trained one; of a LoRA, those of the LoRA alone.

    It starts where training does. Its state is part of checkpoints.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    @contextmanager
    def active(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the trained parameters hold this policy's weights, without gradients.

        Nothing is copied, and no graph that was built before notices.

        Args:
            trained: The trained parameters by name.
        """
        own = self._weights_of(trained)
        new = [parameter.data for parameter in trained.values()]
        with torch.no_grad():
            try:
                for parameter, weight in zip(trained.values(), own, strict=True):
                    parameter.data = weight
                yield
            finally:
                for parameter, weight in zip(trained.values(), new, strict=True):
                    parameter.data = weight

    def follow(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        """Move to decay old + (1 - decay) trained.

        Args:
            trained: The trained parameters by name.
            decay: In [0, 1]; 0 takes the trained weights as they are.
        """
        for own, parameter in zip(self._weights_of(trained), trained.values(), strict=True):
            own.lerp_(parameter.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name; none before the first use."""
        return dict(self._weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights that `state_dict` returned."""
        self._weights = {name: weight.clone() for name, weight in state.items()}

    def _weights_of(self, trained: Mapping[str, nn.Parameter]) -> Sequence[Tensor]:
        """Return the weights on the devices of the trained ones; those as they are at first."""
        if not self._weights:
            self._weights = {name: p.detach().clone() for name, p in trained.items()}
        if self._weights.keys() != trained.keys():
            raise UsageError(
                "the checkpoint's sampling policy has other weights than this model trains; use "
                "the lora settings (rank, targets) of the run"
            )
        for name, parameter in trained.items():
            self._weights[name] = self._weights[name].to(parameter.device, parameter.dtype)
        return [self._weights[name] for name in trained]
