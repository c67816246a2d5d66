"""What a DataModule yields, checked before a round or an evaluation begins."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import described

__all__ = ["BatchCheck", "check_batch"]

_REMEDY = "lit_rlft.kit.data.SplitData and its Rows make such batches"


def check_batch(batch: Any) -> None:
    """Raise UsageError unless a batch is a dict with its `index`.

    Other columns are the pipeline's own affair: what it makes of them is checked.

    All noise is seeded by `index`: rows of the same number would get the same samples.
    """
    if not isinstance(batch, Mapping):
        kind = described(batch)
        raise UsageError(f"the data yield {kind}; a batch is a dict of columns; {_REMEDY}")
    rule = f"it is an int64 tensor [B], the numbers of the data's rows; {_REMEDY}"
    if "index" not in batch:
        raise UsageError(f"the batches of the data have no index, only {sorted(batch)}; {rule}")
    index = batch["index"]
    whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dim() == 1
    if not whole:
        raise UsageError(f"the data yield {described(index)} as index; {rule}")


class BatchCheck(Callback):
    """Checks each batch of every loop."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the conditions of a round."""
        check_batch(batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check what is evaluated."""
        check_batch(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
