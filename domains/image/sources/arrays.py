"""Images of array files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from domains.image.sources.base import CHANNELS, Images, Source
from lit_rlft.core.checks import UsageError, one_of
from lit_rlft.kit.files import reason

__all__ = ["Arrays", "Layout"]

Layout = Literal["auto", "channels_last", "channels_first"]


class Arrays(Source):
    """Images of an array file: `.npy`, memory-mapped where it is uint8, or `.npz`.

    [n, H, W], [n, H, W, C] or [n, C, H, W], uint8 or floating point in [0, 1].

    Args:
        path: The file.
        key: Name of the images in an `.npz`; None takes "images", or the only array there is.
        layout: Where the channels are; "auto" takes the axis that has 1 or 3 entries.

    Raises:
        UsageError: In `load`, the file cannot be read or holds no images.
    """

    def __init__(self, path: str, key: str | None = None, layout: Layout = "auto") -> None:
        one_of(self, "layout", get_args(Layout), layout)
        self.path, self.key, self.layout = Path(path), key, layout

    def prepare(self) -> None:
        if not self.path.is_file():
            raise UsageError(f"there is no file {self.path}; give a .npy or .npz of images")

    def load(self) -> Images:
        self.prepare()
        try:
            loaded = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy reads headers as Python, which fails in many ways
            raise self._unreadable(error) from error
        if isinstance(loaded, np.ndarray):
            return Images(self._bytes(self._channels_first(loaded)))
        with loaded:
            name = self._name(loaded.files)
            try:
                pixels, labels = loaded[name], loaded.get("labels")
            except Exception as error:  # numpy reads headers as Python, which fails in many ways
                raise self._unreadable(error) from error
        if labels is not None and len(labels) != len(pixels):
            raise UsageError(f"{self.path} has {len(pixels)} images but {len(labels)} labels")
        return Images(self._bytes(self._channels_first(pixels)), labels)

    def _unreadable(self, error: Exception) -> UsageError:
        return UsageError(
            f"{self.path} cannot be read as an array file ({reason(error)}); write it with "
            "numpy.save or numpy.savez"
        )

    def _name(self, names: Sequence[str]) -> str:
        if self.key is not None:
            if self.key not in names:
                raise UsageError(f"{self.path} has no {self.key!r}, only {sorted(names)}; set key")
            return self.key
        if "images" in names:
            return "images"
        if len(names) != 1:
            raise UsageError(f"{self.path} holds {sorted(names)}; set key to the images' name")
        return names[0]

    def _channels_first(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return a view [n, C, H, W]."""
        if pixels.ndim == 3:
            pixels = pixels[:, None]
            first = True
        elif pixels.ndim == 4:
            here, last = pixels.shape[1] in CHANNELS, pixels.shape[3] in CHANNELS
            if self.layout == "auto" and here == last:
                what = "both axes 1 and 3 have" if here else "neither axis 1 nor 3 has"
                raise UsageError(
                    f"{self.path} has the shape {pixels.shape}: {what} 1 or 3 entries; set layout "
                    "to 'channels_first' or 'channels_last', or fix the file"
                )
            first = here if self.layout == "auto" else self.layout == "channels_first"
        else:
            raise UsageError(
                f"{self.path} has the shape {pixels.shape}; images are [n, H, W], [n, H, W, C] or "
                "[n, C, H, W]"
            )
        pixels = pixels if first else pixels.transpose(0, 3, 1, 2)
        if not pixels.size or pixels.shape[1] not in CHANNELS:
            raise UsageError(
                f"{self.path} has {len(pixels)} images of {pixels.shape[1]} channels; give at "
                "least one, of 1 or 3 channels"
            )
        return pixels

    def _bytes(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        if pixels.dtype == np.uint8:
            return pixels
        if not np.issubdtype(pixels.dtype, np.floating):
            raise UsageError(f"{self.path} holds {pixels.dtype}; give uint8, or floats in [0, 1]")
        out = np.empty(pixels.shape, np.uint8)
        for i, image in enumerate(pixels):  # one at a time: the file may be larger than memory
            if not (image.min() >= 0 and image.max() <= 1):  # NaN fails too
                raise UsageError(
                    f"{self.path}: image {i} has values outside [0, 1]; scale them, or give uint8"
                )
            out[i] = np.round(image.astype(np.float64) * 255)
        return out
