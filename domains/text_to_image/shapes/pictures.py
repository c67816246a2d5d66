"""Pictures of the shapes world without their captions, and what they show as labels.

    python -m domains.text_to_image.shapes.pictures --num 20000 --size 32 --seed 1 --out shapes.npz

writes `images` uint8 [n, size, size, 3], `labels` bool [n, 17] and their names, `classes`.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from domains.text_to_image.shapes.world import (
    COLORS,
    GROUNDS,
    SHAPES,
    SIZE,
    Picture,
    Scene,
    compose,
    render,
    split_prompts,
)

__all__ = ["CLASSES", "labels_of", "paint", "scene"]

CLASSES = (*SHAPES, *COLORS, *(f"{name} ground" for name in GROUNDS))
"""What a label tells: which shapes, colours and ground a picture has."""


def scene(seed: int, number: int) -> Scene:
    """Return the scene of a picture: a training prompt of any of the six tasks, composed."""
    rng = np.random.default_rng([seed, number])
    prompts = split_prompts("train")
    return compose(prompts[rng.integers(len(prompts))], rng)


def paint(seed: int, number: int, size: int = SIZE) -> Picture:
    """Return picture `number`, uint8 [size, size, 3]: a function of the seed and the number."""
    return render(scene(seed, number), size)


def labels_of(shown: Scene) -> NDArray[np.bool_]:
    """Return which of `CLASSES` a scene shows, bool [17]."""
    names = {name for figure in shown.figures for name in (figure.shape, figure.color)}
    return np.array([name in names | {f"{shown.ground} ground"} for name in CLASSES])


def main() -> None:
    """Write pictures and labels to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=20000, help="number of pictures")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    options = parser.parse_args()
    numbers = range(options.num)
    np.savez_compressed(
        options.out,
        images=np.stack([paint(options.seed, i, options.size) for i in numbers]),
        labels=np.stack([labels_of(scene(options.seed, i)) for i in numbers]),
        classes=np.array(CLASSES),
    )


if __name__ == "__main__":
    main()
