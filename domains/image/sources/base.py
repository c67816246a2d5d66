"""The interface of sources of images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_rlft.kit import sources

__all__ = ["CHANNELS", "Images", "Source"]

CHANNELS = (1, 3)
"""Numbers of channels that images may have."""


@dataclass(frozen=True)
class Images:
    """n images of one size.

    Attributes:
        pixels: uint8 [n, C, H, W], C = 1 or 3; may be memory-mapped.
        labels: What each shows, int [n] or bool [n, K], or None where nothing is known of it.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[Any] | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.pixels)


class Source(sources.Source[Images]):
    """A collection of images."""

    noun = "images"

    def kind(self) -> str:
        return f"images {list(self.shape())} (channels, height, width)"

    def shape(self) -> tuple[int, ...]:
        """Return channels, height and width of the images."""
        return self.load().pixels.shape[1:]
