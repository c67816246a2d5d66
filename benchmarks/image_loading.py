"""Images per second from a folder: the first pass, which decodes, and later ones, which do not.

Method: writes JPEG files of smooth noise, then prepares a DataModule and walks its training loader
(batches of 64, no workers) twice: of a folder seen for the first time, of the same folder in
another run, whose array is memory-mapped, and of the same pixels held in memory, the upper bound.
Preparing is decoding where the folder is new, else finding out that no file has changed.

    python benchmarks/image_loading.py --num 10000 --side 128 --size 64
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from domains.image.data import ImageData
from domains.image.sources import ImageFolder, Images, Source


class Held(Source):
    """Images that are in memory.

    Args:
        images: The images.
    """

    def __init__(self, images: Images) -> None:
        self.images = Images(np.array(images.pixels))

    def load(self) -> Images:
        return self.images


def write(folder: Path, num: int, side: int) -> None:
    """Write JPEG files, a hundred to a folder."""
    rng = np.random.default_rng(0)
    for i in range(num):
        path = folder / str(i // 100) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def measure(name: str, source: Source) -> None:
    """Print what preparing and two passes take."""
    start = time.monotonic()
    data = ImageData(source, batch_size=64, val_fraction=0.01, test_fraction=0.01)
    data.setup("fit")
    text = f"{name}: prepared in {time.monotonic() - start:.2f} s"
    for which in ("first", "second"):
        start = time.monotonic()
        count = sum(len(batch["index"]) for batch in data.train_dataloader())
        text += f", {which} pass {count / (time.monotonic() - start):.0f} images a second"
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=10000, help="files")
    parser.add_argument("--side", type=int, default=128, help="their height and width")
    parser.add_argument("--size", type=int, default=64, help="height and width asked for")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        write(pictures, options.num, options.side)

        def source() -> ImageFolder:
            cache = str(Path(folder) / "cache")
            return ImageFolder(
                str(pictures), options.size, num_threads=options.threads, cache_dir=cache
            )

        measure("new folder", source())
        measure("known folder", source())
        measure("held in memory", Held(source().load()))


if __name__ == "__main__":
    main()
