"""The switch of an adapter: on, off for the reference, or merged into the weights for sampling.

A merged LoRA costs the kernels of the plain network. Its weights W + (alpha / rank) B A are written
into the places of W, so that compiled code and captured graphs find them, and the adapter is
switched off. W is kept aside and written back afterwards: subtracting would change its last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import State, leaves

__all__ = ["AdapterSwitch", "Merge"]

Merge = bool | Literal["auto"]

_KEY = "model.init_args.lora.merge_for_sampling"
_TOLERANCE, _COARSE_TOLERANCE = 1e-4, 0.1
"""How far merged predictions may be from others, in their own size: in single precision, and in
precisions that round a merged weight to fewer digits than its update has."""


class AdapterSwitch:
    """Switches the layers of a LoRA.

    Args:
        layers: The layers, none where there is no adapter.
        merge: Whether `merged` merges. "auto" does where layers compute in single precision or
            better: a weight of 8 bits loses a small update that an adapter of its own adds exactly.
    """

    def __init__(self, layers: Sequence[BaseTunerLayer], merge: Merge = False) -> None:
        self._layers, self._merge = tuple(layers), merge
        self._off = self._checked = False
        self._base: list[Tensor] | None = None
        self._merged: list[Tensor] | None = None

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into the weights, or was until `off` took it out."""
        return self._base is not None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the network is the one without its adapter, also where it is merged."""
        if self._off:
            yield
            return
        self._off = True
        if self._base is not None:
            if self._merged is None:
                self._merged = [weight.detach().clone() for weight in self._weights]
            self._write(self._base)
        self._enable(False)
        try:
            yield
        finally:
            self._off = False
            if self._merged is not None:
                self._write(self._merged)
            self._enable(not self.is_merged)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Within the block the update is `factor` times as large."""
        before = [dict(layer.scaling) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.scaling.update({name: factor * own for name, own in layer.scaling.items()})
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                layer.scaling.update(own)

    @contextmanager
    def merged(self, predict: Callable[[], State]) -> Iterator[None]:
        """Within the block the adapter is merged into the weights, if it can be and should.

        It is not where gradients are wanted, which a merged adapter has none of. The memory is a
        copy of the adapted weights, and another one once `off` is entered within the block.

        Args:
            predict: Predicts something. The first time that an update is not zero, predictions with
                and without merging are compared, and the adapter stays apart where they differ.

        Raises:
            UsageError: It should be, but the weights are shared out over processes.
        """
        if self._off or self.is_merged or not self._wanted() or not self._agree(predict):
            yield
            return
        with self._merging():
            yield

    def _wanted(self) -> bool:
        if not self._layers or not self._merge or torch.is_grad_enabled():
            return False
        if any(type(weight) is not nn.Parameter for weight in self._weights):
            if self._merge == "auto":
                return False
            raise UsageError(f"{_KEY} must be auto or false where processes share out weights")
        return self._merge is True or self._precise

    @property
    def _precise(self) -> bool:
        """Whether layers compute with all digits of single precision."""
        if torch.get_float32_matmul_precision() != "highest":
            return False
        wide = all(weight.dtype in (torch.float32, torch.float64) for weight in self._weights)
        return wide and not torch.is_autocast_enabled(self._weights[0].device.type)

    def _agree(self, predict: Callable[[], State]) -> bool:
        """Compare predictions, once, and say so if they differ too much."""
        if self._checked or not torch.stack([_delta(la).any() for la in self._layers]).any():
            return bool(self._merge)
        self._checked = True
        with torch.compiler.set_stance("force_eager"):  # other code would have to be compiled
            apart = predict()
            with self._merging():
                merged = predict()
        error, tolerance = _error(merged, apart), _TOLERANCE if self._precise else _COARSE_TOLERANCE
        if error <= tolerance:
            return True
        self._merge = False
        rank_zero_warn(
            f"the LoRA is not merged for sampling: predictions would differ by {error:.1e} of "
            f"their size, at most {tolerance:g} is allowed; set {_KEY} to false"
        )
        return False

    @contextmanager
    def _merging(self) -> Iterator[None]:
        self._base = [weight.detach().clone() for weight in self._weights]
        try:
            with torch.no_grad():
                for layer, weight in zip(self._layers, self._weights, strict=True):
                    weight.copy_(weight + _delta(layer))
            self._enable(False)
            yield
        finally:
            self._write(self._base)
            self._base = self._merged = None
            self._enable(True)

    @property
    def _weights(self) -> list[Tensor]:
        return [_base_of(layer).weight for layer in self._layers]

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._weights, values)

    def _enable(self, enabled: bool) -> None:
        for layer in self._layers:
            # peft's own switch also toggles requires_grad; forward reads this flag alone. It is
            # a plain attribute, so the search of `Module.__setattr__` is left out, step by step.
            vars(layer)["_disable_adapters"] = not enabled


def _base_of(layer: Any) -> Any:
    return layer.get_base_layer()


def _delta(layer: Any) -> Tensor:
    """Return the update of a layer's weight, in the precision that it is trained in."""
    (name,) = layer.active_adapters
    with torch.no_grad(), torch.autocast(_base_of(layer).weight.device.type, enabled=False):
        delta: Tensor = layer.get_delta_weight(name)
    return delta


def _error(found: State, expected: State) -> float:
    """Return the difference of two predictions, relative to the second one."""
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return float((off / size) ** 0.5) if size else float(off > 0)
