"""The DataModule: splits, limits, mirror images."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from domains.image.data import ImageData
from domains.image.sources import Digits, Generated
from lit_rlft.core.checks import UsageError
from tests.domains.image.sources.test_sources import paint


def images(data: ImageData, split: Any) -> torch.Tensor:
    data.prepare_data()
    data.setup("fit")
    dataset = data.rows(split)
    return torch.stack([dataset[i]["image"] for i in range(len(dataset))])  # type: ignore[arg-type]


def test_splits_share_no_image_and_lose_none() -> None:
    source = Generated(paint, num_images=40, size=4)
    data = ImageData(source, val_fraction=0.1, test_fraction=0.2)
    parts = [images(data, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [28, 4, 8]
    every = {image.numpy().tobytes() for part in parts for image in part}
    assert every == {image.tobytes() for image in source.load().pixels} and len(every) == 40
    assert parts[0].dtype == torch.uint8 and parts[0].shape[1:] == (3, 4, 4)


def test_own_sources_and_limits() -> None:
    source, other = Generated(paint, 20, 4), Generated(paint, 9, 4, seed=5)
    data = ImageData(source, test_source=other, num_train=10, num_val=2, num_test=7)
    assert [len(images(data, split)) for split in ("train", "val", "test")] == [10, 2, 7]
    np.testing.assert_array_equal(images(data, "test").numpy(), other.load().pixels[:7])


def test_mirror_images_are_rows_of_their_own() -> None:
    data = ImageData(Generated(paint, 20, 4), mirror=True)
    train = images(data, "train")
    assert len(train) == 32
    torch.testing.assert_close(train[16:], train[:16].flip(-1), rtol=0, atol=0)
    assert not torch.equal(train[16:], train[:16])
    assert len(images(data, "val")) == len(images(data, "test")) == 2


def test_the_order_follows_from_the_seed() -> None:
    first, again = (images(ImageData(Digits(), seed=1), "train") for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, images(ImageData(Digits(), seed=2), "train"))


def test_batches() -> None:
    data = ImageData(batch_size=32, eval_batch_size=50, num_test=120)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (32, 1, 8, 8) and batch["image"].dtype == torch.uint8
    rows = data.rows("train")
    for i, image in zip(batch["index"].tolist(), batch["image"], strict=True):
        assert torch.equal(rows[i]["image"], image)
    assert [len(b["index"]) for b in data.test_dataloader()] == [50, 50, 20]


def small(seed: int, number: int, size: int) -> NDArray[np.uint8]:
    return paint(seed, number, size)


def test_data_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"val_source has images \[3, 5, 5\] .* has images \[3, 4"):
        ImageData(Generated(small, 9, 4), val_source=Generated(small, 9, 5)).setup("fit")
    with pytest.raises(UsageError, match="has 2 images, too few for three splits"):
        ImageData(Generated(small, 2, 4)).setup("fit")
