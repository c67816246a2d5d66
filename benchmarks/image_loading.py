"""Images per second from a folder: the first pass, which decodes, and later ones, which do not.

Method: writes JPEG files of smooth noise, then walks the training loader (batches of 64, no
workers) three times: over a folder seen for the first time, over the same folder in a new
DataModule, whose array is memory-mapped, and over the same pixels held in memory, the upper bound.

    python benchmarks/image_loading.py --num 2000 --side 128 --size 64
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


def seconds(source: Source) -> tuple[int, float]:
    """Return the number of images of a pass, and the wall time of preparing and walking it."""
    start, count = time.monotonic(), 0
    data = ImageData(source, batch_size=64, val_fraction=0.01, test_fraction=0.01)
    data.setup("fit")
    for batch in data.train_dataloader():
        count += len(batch["index"])
    return count, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=2000, help="files")
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

        for name in ("first pass", "second pass", "held in memory"):
            which = Held(source().load()) if name == "held in memory" else source()
            count, taken = seconds(which)
            print(f"{name}: {count} images in {taken:.2f} s, {count / taken:.0f} a second")


if __name__ == "__main__":
    main()
