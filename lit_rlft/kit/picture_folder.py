"""Folders of pictures: decoding, and the memory-mapped array that later passes read."""

import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.kit.bad_entries import BadEntry, Report, usable
from lit_rlft.kit.cache import cached_folder, listing, save_report, user_cache
from lit_rlft.kit.files import listed

__all__ = [
    "SUFFIXES",
    "Cache",
    "Fit",
    "Reading",
    "Report",
    "Resample",
    "picture_files",
    "read_picture",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Fit = Literal["crop", "pad", "stretch"]
Resample = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]

_VERSION = 1  # of the cached arrays
_CHUNK = 256  # files in flight, which bounds the memory of decoding
# What Pillow's decoders raise for broken files.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Reading:
    """How a picture file becomes an array.

    Attributes:
        height: In pixels.
        width: In pixels.
        fit: How other proportions are treated.
        resample: PIL's filter.
        channels: 1 or 3.
    """

    height: int
    width: int
    fit: Fit = "crop"
    resample: Resample = "lanczos"
    channels: int = 3

    def __post_init__(self) -> None:
        at_least(1, self, size=(self.height, self.width))
        one_of(self, "fit", get_args(Fit))
        one_of(self, "resample", get_args(Resample))
        one_of(self, "channels", (1, 3))

    def read(self, path: Path) -> tuple[NDArray[np.uint8], bool] | BadEntry:
        """Return the pixels [C, H, W] of a file and whether it had to be enlarged.

        A file that cannot be decoded gives what is wrong with it instead.
        """
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image = _plain(image, "RGB" if self.channels == 3 else "L")
                small = image.width < self.width or image.height < self.height
                fitted = self._fitted(image)
        except _BROKEN as error:
            return _fault(path, error)
        pixels = np.asarray(fitted, np.uint8)
        return (pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]), small

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = (self.width, self.height)
        if image.size == size:
            return image
        resample = Image.Resampling[self.resample.upper()]
        if self.fit == "stretch":
            return image.resize(size, resample)
        if self.fit == "crop":
            return ImageOps.fit(image, size, resample)
        return ImageOps.pad(image, size, resample)


class Cache:
    """The array of a folder's pictures, made when first needed.

    Args:
        folder: Where the pictures are.
        reading: How each is read.
        strict: Stop at the first file that cannot be read instead of leaving it out.
        num_threads: Files decoded at a time.
        cache_dir: Where arrays are kept; None takes `lit-rlft` in the user's cache folder.
    """

    def __init__(
        self,
        folder: Path,
        reading: Reading,
        strict: bool = False,
        num_threads: int = 4,
        cache_dir: str | None = None,
    ) -> None:
        at_least(1, self, num_threads=num_threads)
        self.folder, self.reading, self.strict = folder, reading, strict
        self.num_threads = num_threads
        self.cache_dir = user_cache("image", cache_dir)

    def load(self) -> tuple[NDArray[np.uint8], str]:
        """Return the pictures, uint8 [n, C, H, W] memory-mapped, and the report.

        Raises:
            UsageError: There is no such folder, no picture in it, or a broken one and `strict`;
                or the cache cannot be written.
        """
        made = self.fill()
        shape = json.loads((made / "shape.json").read_text(encoding="utf-8"))
        pixels = np.memmap(made / "pixels.bin", np.uint8, "r", shape=tuple(shape))
        return pixels, (made / "report.txt").read_text(encoding="utf-8")

    def fill(self) -> Path:
        """Return the folder of the array, which is made where it is missing; raises as `load`."""
        paths = self.paths()
        folder = self.cache_dir / self._key(paths)
        return cached_folder(folder, partial(self._fill, paths, folder))

    def paths(self) -> list[Path]:
        """Return the picture files, as `picture_files` does."""
        return picture_files(self.folder)

    def left_out(self) -> str:
        """Return every picture that could not be read, a sentence a line."""
        return listing(self.cache_dir / self._key(self.paths()))

    def _key(self, paths: Sequence[Path]) -> str:
        """Name the array by all that it depends on: every file's name, age and size too."""
        digest = hashlib.blake2b(digest_size=8)
        settings = [_VERSION, str(self.folder.resolve()), asdict(self.reading), self.strict]
        digest.update(json.dumps(settings).encode())
        for path in paths:
            stat = path.stat()
            name = os.fsencode(path.relative_to(self.folder))
            digest.update(b"%d,%d,%s\0" % (stat.st_mtime_ns, stat.st_size, name))
        return f"{self.folder.resolve().name}-{digest.hexdigest()}"

    def _fill(self, paths: Sequence[Path], final: Path, folder: Path) -> None:
        """Decode the pictures into a folder, one after the other: they may not fit in memory."""
        report, num_enlarged = Report(str(self.folder), "pictures", self.strict), 0
        with (folder / "pixels.bin").open("wb") as file:
            for pixels, enlarged in usable(self._decoded(paths), lambda _: None, report):
                num_enlarged += enlarged
                file.write(pixels.tobytes())
        report.notes += [f"{num_enlarged} enlarged"] if num_enlarged else []
        unused = [path for path in _files(self.folder) if path.suffix.lower() not in SUFFIXES]
        report.notes += [f"{_kinds(unused)} not looked at"] if unused else []
        report.check()
        size = (self.reading.channels, self.reading.height, self.reading.width)
        (folder / "shape.json").write_text(json.dumps([report.num_kept, *size]), encoding="utf-8")
        save_report(folder, final, report)

    def _decoded(
        self, paths: Sequence[Path]
    ) -> Iterator[tuple[NDArray[np.uint8], bool] | BadEntry]:
        bar = tqdm(total=len(paths), desc=f"Reading {self.folder.name}", leave=False, delay=2)
        with ThreadPoolExecutor(self.num_threads) as pool, bar:
            for start in range(0, len(paths), _CHUNK):
                for outcome in pool.map(self.reading.read, paths[start : start + _CHUNK]):
                    bar.update()
                    yield outcome


def read_picture(sample: Any, folder: Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Return the pixels of a picture's file, uint8 [C, H, W], cropped and resized to `size`.

    Args:
        sample: The file, relative to `folder`.
        folder: Where it is.
        size: Height and width in pixels.
        channels: 1 or 3.

    Raises:
        UsageError: It is no file of a picture.
    """
    if not isinstance(sample, str):
        raise UsageError(f"a picture is the path of its file, got a {type(sample).__name__}")
    found = Reading(*size, channels=channels).read(folder / sample)
    if isinstance(found, BadEntry):
        raise UsageError(f"{found}; give a file that Pillow reads")
    return torch.from_numpy(np.array(found[0]))


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files below a folder, sorted.

    Raises:
        UsageError: There is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give the folder of the pictures")
    files = _files(folder)
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        others = f"; it has {_kinds(files)}" if files else ""
        raise UsageError(
            f"{folder} has no picture files ({', '.join(SUFFIXES)}) in it or below{others}; give "
            "the folder of the pictures"
        )
    return paths


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder but hidden ones, sorted."""
    return [path for path in listed(folder, "**/*") if path.is_file()]


def _kinds(files: Sequence[Path]) -> str:
    """Return the numbers of files by suffix, such as "2 other files (1 .gif, 1 .txt)"."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in files)
    kinds = [f"{count} {suffix}" for suffix, count in counts.most_common(5)]
    more = ", ..." if len(counts) > len(kinds) else ""
    noun = "file" if len(files) == 1 else "files"
    return f"{len(files)} other {noun} ({', '.join(kinds)}{more})"


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """Return an image as 8-bit RGB or grey, transparent pixels on white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip
        grey = np.asarray(image, np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _fault(path: Path, error: BaseException) -> BadEntry:
    """Return what is wrong with a file, as one of a few kinds under which files are counted."""
    if isinstance(error, UnidentifiedImageError):
        return BadEntry(path.name, "no readable picture")
    if isinstance(error, Image.DecompressionBombError):
        return BadEntry(path.name, "too many pixels")
    if isinstance(error, OSError) and error.strerror:
        return BadEntry(path.name, "an error on reading", error.strerror.lower())
    return BadEntry(path.name, "damage or an early end")
