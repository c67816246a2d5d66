"""DataModule of images."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from domains.image.sources import Digits, Images, Source
from lit_rlft.kit.data import Record, Rows, Split
from lit_rlft.kit.sources import SourceData

__all__ = ["ImageData"]


class ImageData(SourceData[Images]):
    """Images, split at random; rows are `{"index", "image": uint8 [C, H, W]}`.

    Generation is unconditional: only the number of validation and test rows matters, one row for
    each sample (times `num_eval_samples`).

    Args:
        source: The images; the embedded digits unless given.
        val_source: Images of the validation split; None holds out some of `source`.
        test_source: Images of the test split; None holds out some of `source`.
        val_fraction: Share of `source` held out for validation, where it has no source.
        test_fraction: Share of `source` held out for the test, where it has no source.
        mirror: Train on each image's mirror image too, as a row of its own.
        **rest: Limits of the splits (`SourceData`) and arguments of the loaders.

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
        mirror: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(
            source or Digits(),
            val_source=val_source,
            test_source=test_source,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            **rest,
        )
        self.mirror = mirror

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        images, chosen = self.chosen(split)
        mirror = self.mirror and split == "train"

        def row(i: int) -> Record:
            image = images.pixels[chosen[i % len(chosen)]]
            image = image[..., ::-1] if i >= len(chosen) else image
            return {"image": torch.from_numpy(np.array(image))}

        return Rows(len(chosen) * (2 if mirror else 1), row)
