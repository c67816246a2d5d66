"""TF32: products of single-precision numbers on a GPU's tensor cores."""

from dataclasses import dataclass
from typing import Self

import torch
from lightning import Callback, LightningModule, Trainer

__all__ = ["TF32"]


@dataclass(frozen=True)
class _Switches:
    """Torch's own switches for all of a process."""

    matmul: str
    convolutions: bool

    @classmethod
    def here(cls) -> Self:
        return cls(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

    def apply(self) -> None:
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.convolutions


class TF32(Callback):
    """Lets a GPU multiply float32 numbers as TF32: factors of 10 bits, sums in float32.

    It concerns what runs in float32: all under `trainer.precision` 32-true, and under a mixed one
    what autocast leaves alone. On other devices nothing changes. The switches are torch's, of all
    of the process; they are set back at the end.

    Args:
        enabled: False computes in full float32, matrix products and convolutions alike.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: _Switches | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set torch's switches, before the model is set up and side processes copy them."""
        if trainer.strategy.root_device.type != "cuda" or self._before is not None:
            return
        self._before = _Switches.here()
        _Switches("high" if self.enabled else "highest", self.enabled).apply()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set them back."""
        if self._before is not None:
            self._before.apply()
            self._before = None
