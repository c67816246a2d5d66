"""Batches of a DataModule of one's own are looked at before anything is drawn for them."""

from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft import GRAFT, Sampler
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.batch_check import check_batch
from tests.support import trainer_of


class Own(LightningDataModule):
    """The same rows in every split."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader = train_dataloader


def a_tuner() -> GRAFT:
    return GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(num_steps=2, eta=1.0))


COLUMNS = [
    ([], "the data yield a list; a batch is a dict of columns"),
    (torch.zeros(4, 2), r"the data yield a tensor of float32 \[4, 2\]; a batch is a dict"),
    ({"prompt": ["a"]}, r"have no index, only \['prompt'\]; it is an int64 tensor \[B\]"),
    ({"index": ["0"]}, "the data yield a list as index"),
    ({"index": torch.zeros(4)}, r"float32 \[4\] as index"),
    ({"index": torch.zeros(4, 1, dtype=torch.int64)}, r"int64 \[4, 1\] as index"),
]


@pytest.mark.parametrize(("batch", "sentence"), COLUMNS)
def test_what_is_no_batch_is_refused(batch: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_batch(batch)


def test_columns_of_any_kind_pass() -> None:
    state = {"box": torch.zeros(2, 3)}
    check_batch({"index": torch.arange(2), "prompt": ["a", "b"], "state": state, "seed": 3})
    check_batch({"index": torch.arange(2, dtype=torch.int32)})
    # As torch's collate makes of a tuple in each row.
    check_batch({"index": torch.arange(4), "size": [torch.ones(4), torch.ones(4)]})


@pytest.mark.parametrize("loop", ["fit", "validate", "test", "predict"])
def test_every_loop_refuses_tuples(loop: str) -> None:
    data = Own(TensorDataset(torch.zeros(8, 2)))
    trainer = trainer_of(limit_val_batches=1.0 if loop == "validate" else 0)
    with pytest.raises(UsageError, match="the data yield a list"):
        getattr(trainer, loop)(a_tuner(), data)


def test_rows_that_are_dicts_with_an_index_train() -> None:
    tuner = a_tuner()
    trainer_of().fit(tuner, Own([{"index": i} for i in range(8)]))
    assert tuner.num_rounds == 2
