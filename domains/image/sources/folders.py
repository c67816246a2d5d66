"""Images of folders of picture files."""

from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from domains.image.sources.base import Images, Source
from lit_rlft.kit.picture_folder import Cache, Fit, Reading, Resample

__all__ = ["ImageFolder"]


class ImageFolder(Source):
    """The pictures below a folder, nested or not, decoded once and kept as a memory-mapped array.

    PNG, JPEG and WebP files; others are counted in the report. When a file is added, removed or
    changed, or an option differs, a new array is made. Transparent pixels are painted on white,
    16-bit greys are scaled, EXIF rotations are applied, and of several frames the first is taken.

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
        UsageError: A setting is out of range; or, in `load`, there is no such folder, no readable
            picture in it, or an unreadable one and `strict`.
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
        height, width = (size, size) if isinstance(size, int | float) else size
        self.reading = Reading(height, width, fit, resample, channels)
        self.cache = Cache(Path(path), self.reading, strict, num_threads, cache_dir)

    def load(self) -> Images:
        pixels, report = self.cache.load()
        rank_zero_info(report)
        return Images(pixels)

    def prepare(self) -> None:
        self.cache.fill()

    def left_out(self) -> str:
        return self.cache.left_out()

    def shape(self) -> tuple[int, ...]:
        return self.reading.channels, self.reading.height, self.reading.width
