"""Cuts 32 x 32 patches out of photographs, split by place: no pixel is in both parts.

Method: each photograph is tiled in blocks of 48 x 48 pixels, a fifth of which is held out at
random. A patch belongs to a part if all its pixels do; patches of a part lie every second pixel and
overlap each other. The photographs are the two that scikit-learn ships (`pip install scikit-learn`;
china.jpg, flower.jpg, 427 x 640), or all of a folder.

    python benchmarks/photo_patches.py --out runs/patches
    python benchmarks/photo_patches.py --out runs/patches --pictures my_photographs

Writes train.npy and held_out.npy, uint8 [n, 32, 32, 3], which
`domains.image.sources.Arrays` reads.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE, BLOCK, STRIDE, HELD_OUT = 32, 48, 2, 0.2
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

Picture = NDArray[np.uint8]


def photographs(folder: Path | None) -> list[Picture]:
    """Return pictures [H, W, 3]: those of a folder, or the two that scikit-learn ships.

    Raises:
        SystemExit: There is no scikit-learn, or no picture in the folder.
    """
    folder = folder or shipped()
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise SystemExit(f"{folder} has no file that ends in {', '.join(ENDINGS)}; see --pictures")
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def shipped() -> Path:
    """Return the folder of scikit-learn's photographs, without importing it.

    Raises:
        SystemExit: There is no scikit-learn.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the photographs are those of scikit-learn: pip install scikit-learn, or give a "
            "folder of your own with --pictures"
        )
    return Path(spec.origin).parent / "datasets" / "images"


def held_out_pixels(height: int, width: int, share: float, seed: Any) -> NDArray[np.bool_]:
    """Return which pixels are held out, bool [H, W]: a share of the blocks, at least one."""
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    chosen = np.zeros(rows * columns, bool)
    order = np.random.default_rng(seed).permutation(len(chosen))
    chosen[order[: max(1, round(share * len(chosen)))]] = True
    blocks = chosen.reshape(rows, columns)
    return blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:height, :width]


def patches(picture: Picture, allowed: NDArray[np.bool_]) -> Picture:
    """Return the patches [n, 32, 32, 3] of which every pixel is allowed."""
    window = np.lib.stride_tricks.sliding_window_view
    whole = window(allowed, (SIZE, SIZE))[::STRIDE, ::STRIDE].all(axis=(2, 3))
    found = window(picture, (SIZE, SIZE), axis=(0, 1))[::STRIDE, ::STRIDE][whole]
    return np.ascontiguousarray(found.transpose(0, 2, 3, 1))


def split(pictures: list[Picture], seed: int) -> tuple[Picture, Picture]:
    """Return training and held-out patches, in a random order."""
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    for i, picture in enumerate(pictures):
        held_out = held_out_pixels(*picture.shape[:2], HELD_OUT, (seed, i))
        parts[0].append(patches(picture, ~held_out))
        parts[1].append(patches(picture, held_out))
    shuffled = np.random.default_rng(seed).permutation
    train, held = (shuffled(np.concatenate(part)) for part in parts)
    return train, held


def main() -> None:
    """Cut, split, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/patches"))
    parser.add_argument("--pictures", type=Path, help="folder of photographs")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the order")
    options = parser.parse_args()
    parts = split(photographs(options.pictures), options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "held_out"), parts, strict=True):
        np.save(options.out / f"{name}.npy", part)
        print(f"{options.out / name}.npy: {len(part):,} patches")


if __name__ == "__main__":
    main()
