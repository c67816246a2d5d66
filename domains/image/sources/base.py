"""Where images come from: the embedded digits, a painter, array files, folders of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from domains.image import EMBEDDED
from domains.image.sources.folder import Cache, Fit, Reading, Resample
from lit_rlft.core.checks import UsageError

__all__ = ["DIGITS", "Arrays", "Digits", "Generated", "ImageFolder", "Images", "Source"]

DIGITS = EMBEDDED / "digits.npz"
_DIGIT_LEVELS = 16
_CHANNELS = (1, 3)
Layout = Literal["auto", "channels_last", "channels_first"]


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


class Source(ABC):
    """A collection of images."""

    @abstractmethod
    def load(self) -> Images:
        """Return the images.

        Raises:
            UsageError: There are none, or one is bad where none may be.
        """


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
        if num_images < 1 or size < 1:
            raise UsageError(f"num_images and size must be at least 1, got {num_images} and {size}")
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
        if layout not in ("auto", "channels_last", "channels_first"):
            raise UsageError(
                f"layout is {layout!r}; use 'auto', 'channels_last' or 'channels_first'"
            )
        self.path, self.key, self.layout = Path(path), key, layout

    def load(self) -> Images:
        if not self.path.is_file():
            raise UsageError(f"there is no file {self.path}; give a .npy or .npz of images")
        try:
            loaded = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise self._unreadable(error) from error
        if isinstance(loaded, np.ndarray):
            return Images(self._bytes(self._channels_first(loaded)))
        with loaded:
            name = self._name(loaded.files)
            try:
                pixels, labels = loaded[name], loaded.get("labels")
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                raise self._unreadable(error) from error
        if labels is not None and len(labels) != len(pixels):
            raise UsageError(f"{self.path} has {len(pixels)} images but {len(labels)} labels")
        return Images(self._bytes(self._channels_first(pixels)), labels)

    def _unreadable(self, error: Exception) -> UsageError:
        reason = str(error).partition("\n")[0]
        return UsageError(
            f"{self.path} cannot be read as an array file ({reason}); write it with numpy.save or "
            "numpy.savez"
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
            here, last = pixels.shape[1] in _CHANNELS, pixels.shape[3] in _CHANNELS
            if self.layout == "auto" and here == last:
                what = "both axes 1 and 3 have" if here else "neither axis 1 nor 3 has"
                raise UsageError(
                    f"{self.path} has the shape {pixels.shape}: {what} 1 or 3 entries; set layout "
                    "to 'channels_first' or 'channels_last', or mend the file"
                )
            first = here if self.layout == "auto" else self.layout == "channels_first"
        else:
            raise UsageError(
                f"{self.path} has the shape {pixels.shape}; images are [n, H, W], [n, H, W, C] or "
                "[n, C, H, W]"
            )
        pixels = pixels if first else pixels.transpose(0, 3, 1, 2)
        if not pixels.size or pixels.shape[1] not in _CHANNELS:
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


class ImageFolder(Source):
    """The pictures below a folder, nested or not, decoded once and kept as a memory-mapped array.

    PNG, JPEG and WebP files. The array is made anew when a file is added, removed or changed, or
    another option is chosen. Transparent pixels are painted on white, 16-bit greys are scaled,
    EXIF rotations are applied, and of several frames the first is taken.

    Args:
        path: The folder.
        size: Height and width, or [height, width].
        fit: "crop" scales until the picture covers the size and cuts the middle out, "pad" until
            it fits within and fills up with black, "stretch" ignores its proportions.
        resample: PIL's filter.
        channels: 3 for RGB, 1 for grey.
        strict: Stop at the first file that cannot be read instead of leaving it out.
        num_threads: Files decoded at a time.
        cache_dir: Folder of the arrays; None takes `lit-rlft` in the user's cache folder.

    Raises:
        UsageError: A setting is out of range; or, in `load`, there is no such folder, no picture
            in it that can be read, or one that cannot where none may be.
    """

    def __init__(
        self,
        path: str,
        size: int | tuple[int, int] = 32,
        *,
        fit: Fit = "crop",
        resample: Resample = "lanczos",
        channels: Literal[1, 3] = 3,
        strict: bool = False,
        num_threads: int = 4,
        cache_dir: str | None = None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        self.reading = Reading(height, width, fit, resample, channels)
        self.cache = Cache(Path(path), self.reading, strict, num_threads, cache_dir)

    def load(self) -> Images:
        pixels, report = self.cache.load()
        rank_zero_info(report)
        return Images(pixels)
