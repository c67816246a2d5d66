"""An exponential moving average of what an algorithm trains."""

from typing import Any
from weakref import ref

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import below_one
from lit_rlft.distributed import split_like, to_save

__all__ = ["EMA"]


class EMA(Callback):
    """Averages the trainable weights after every batch; evaluates and exports the average.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the start is forgotten
    quickly. The average has single precision at least. It lives in the callback's state and is
    restored on resuming. For another model it starts anew.

    Args:
        decay: Weight of the old average per training batch, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        below_one(self, decay=decay)
        self.decay, self.num_updates = decay, 0
        self.average: list[Tensor] | None = None
        self._raw: list[Tensor] | None = None
        self._model: ref[LightningModule] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a model of this process."""
        return {**vars(self), "_model": None, "_raw": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of another model."""
        if self._model is not None and self._model() is not pl_module:
            self.average, self.num_updates = None, 0
        self._model = ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take an average that a checkpoint gave as that of this model."""
        self._model = ref(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average towards the weights."""
        weights = _weights(pl_module)
        if self.average is None:
            self.average = [_precise(w) for w in weights]
        self.average = _split_like(self.average, weights)
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, weight in zip(self.average, weights, strict=True):
            average.lerp_(weight.to(average), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average."""
        self._model = ref(pl_module)
        if self.average is None:
            return
        weights = _weights(pl_module)
        self._raw = [w.clone() for w in weights]
        _copy(self.average, weights)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the raw weights."""
        if self._raw is not None:
            _copy(self._raw, _weights(pl_module))
            self._raw = None

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model, which is what gets exported after the last checkpoint."""
        if self.average is not None:
            _copy(self.average, _weights(pl_module))

    def state_dict(self) -> dict[str, Any]:
        average = self.average and [to_save(own) for own in self.average]
        return {"average": average, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        average, self.num_updates = state_dict["average"], state_dict["num_updates"]
        self.average = average and [_precise(own) for own in average]
        self._model = None  # the next one that runs


def _precise(weight: Tensor) -> Tensor:
    """Return a copy in single precision at least: in half precision small moves are rounded off."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _weights(pl_module: LightningModule) -> list[Tensor]:
    assert isinstance(pl_module, RewardFineTuner)
    return [p.data for p in pl_module.trainable().parameters() if p.requires_grad]


def _split_like(whole: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return what a checkpoint holds whole as the weights are split among processes."""
    return [split_like(own, like) for own, like in zip(whole, weights, strict=True)]


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for value, place in zip(_split_like(source, target), target, strict=True):
        place.copy_(value)
