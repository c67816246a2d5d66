"""Images that ship with the domain or are painted: the embedded digits, a painter."""

from collections.abc import Callable
from typing import Any

import numpy as np

from domains.image import EMBEDDED
from domains.image.sources.base import Images, Source
from lit_rlft.core.checks import UsageError, at_least

__all__ = ["DIGITS", "Digits", "Generated"]

DIGITS = EMBEDDED / "digits.npz"
_DIGIT_LEVELS = 16


class Digits(Source):
    """1,797 handwritten digits of 13 people, 8 x 8, real; labels are the digits.

    References:
        Optical Recognition of Handwritten Digits, the test set (Alpaydin & Kaynak, 1998; CC BY
        4.0), https://doi.org/10.24432/C50P49
    """

    def load(self) -> Images:
        with np.load(DIGITS) as file:
            levels, labels = file["images"].astype(np.float64), file["labels"].astype(np.int64)
        pixels = np.round(levels * (255 / _DIGIT_LEVELS)).astype(np.uint8)
        return Images(pixels[:, None], labels)


class Generated(Source):
    """Images that a function paints; image i is a function of `seed` and i.

    Args:
        paint: Takes a seed, the image's number and a size, and returns uint8 [size, size, 3].
        num_images: Number of images.
        size: Height and width.
        seed: Seed of the images.

    Raises:
        UsageError: In `load`, the function returns something else.
    """

    def __init__(
        self,
        paint: Callable[[int, int, int], Any],
        num_images: int = 8192,
        size: int = 32,
        seed: int = 0,
    ) -> None:
        at_least(1, self, num_images=num_images, size=size)
        at_least(0, self, seed=seed)
        self.paint, self.num_images, self.size, self.seed = paint, num_images, size, seed
        self._images: Images | None = None

    def load(self) -> Images:
        if self._images is None:
            shape = (self.size, self.size, 3)
            pixels = np.empty((self.num_images, 3, self.size, self.size), np.uint8)
            for i in range(self.num_images):
                image = np.asarray(self.paint(self.seed, i, self.size))
                if image.shape != shape or image.dtype != np.uint8:
                    raise UsageError(
                        f"paint returned {image.dtype} {image.shape} as image {i}; return uint8 "
                        f"{shape}"
                    )
                pixels[i] = image.transpose(2, 0, 1)
            self._images = Images(pixels)
        return self._images

    def shape(self) -> tuple[int, ...]:
        return 3, self.size, self.size
