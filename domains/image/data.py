"""DataModule of images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from domains.image.sources import Digits, Images, Source
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import Record, Rows, Split, SplitData, hold_out

__all__ = ["ImageData"]


class ImageData(SplitData):
    """Images, split at random; rows are `{"index", "image": uint8 [C, H, W]}`.

    Generation is unconditional: of validation and test rows only the number counts, one row for
    each sample (times `num_eval_samples`).

    Args:
        source: The images; the embedded digits unless given.
        val_source: Images of the validation split; None holds out some of `source`.
        test_source: Images of the test split; None holds out some of `source`.
        val_fraction: Share of `source` held out for validation, where it has no source.
        test_fraction: Share of `source` held out for the test, where it has no source.
        num_train: Train on the first so many images; None takes all.
        num_val: Validate on the first so many images; None takes all.
        num_test: Test on the first so many images; None takes all.
        mirror: Train on each image's mirror image too, as a row of its own.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, sources differ in the images' size, or have too few for the splits.
    """

    def __init__(
        self,
        source: Source | None = None,
        *,
        val_source: Source | None = None,
        test_source: Source | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        mirror: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.source = source or Digits()
        self.sources = {"val": val_source, "test": test_source}
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.limits = {"train": num_train, "val": num_val, "test": num_test}
        self.mirror = mirror
        self._splits: dict[str, tuple[Images, NDArray[np.int64]]] = {}

    def prepare_data(self) -> None:
        """Fill the caches of folders, on one process of each machine."""
        for source in (self.source, *self.sources.values()):
            if source is not None:
                source.load()

    def setup(self, stage: str) -> None:
        """Load the images and split them."""
        if self._splits:
            return
        images = self.source.load()
        missing = [split for split, source in self.sources.items() if source is None]
        shares = {split: self.fractions[split] for split in missing}
        drawn = hold_out(len(images), shares, self.seed)
        splits = {split: (images, rows) for split, rows in drawn.items()}
        for split, source in self.sources.items():
            if source is not None:
                own = source.load()
                _check_like(own, images, split)
                splits[split] = (own, np.arange(len(own)))
        if not len(drawn["train"]):
            raise UsageError(
                f"data.init_args.source has {len(images)} images, too few for three splits; give "
                "val_source and test_source or more images"
            )
        self._splits = splits

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        images, chosen = self._splits[split]
        chosen = chosen[: self.limits[split]]
        mirror = self.mirror and split == "train"

        def row(i: int) -> Record:
            image = images.pixels[chosen[i % len(chosen)]]
            image = image[..., ::-1] if i >= len(chosen) else image
            return {"image": torch.from_numpy(np.array(image))}

        return Rows(len(chosen) * (2 if mirror else 1), row)


def _check_like(own: Images, images: Images, split: str) -> None:
    if own.pixels.shape[1:] != images.pixels.shape[1:]:
        raise UsageError(
            f"data.init_args.{split}_source has images {list(own.pixels.shape[1:])}, but source "
            f"has {list(images.pixels.shape[1:])} (channels, height, width); give both the same"
        )
