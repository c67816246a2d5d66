"""The shapes world: captions and pictures that cover GenEval's six tasks in miniature.

A `Prompt` says what has to be seen, `compose` draws a random `Scene` that shows exactly that, and
`render` paints it. Everything is procedural, so data are made on the fly, from a seed, offline.

References:
    GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment
    (Ghosh, Hajishirzi, Schmidt, 2023), https://arxiv.org/abs/2310.11513
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (208, 30, 42),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "yellow": (255, 225, 50),
    "purple": (135, 45, 160),
    "orange": (248, 125, 15),
    "cyan": (40, 205, 225),
    "pink": (245, 95, 170),
}
# Plain and colourless: captions never mention them.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (186, 186, 186),
    "black": (36, 36, 36),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
# Relation -> (axis, sign of the positioned figure's offset along it); y points down.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
Task = Literal[
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
]
TASKS: tuple[Task, ...] = get_args(Task)
Split = Literal["train", "val", "test"]
Picture = NDArray[np.uint8]

_GENEVAL_TAGS = {"two_objects": "two_object", "color_attribution": "color_attr"}
# Of the seeds, one whose small test parts show every shape, colour and count.
_SPLIT_SEED = 536
_MARGIN = 2.0  # pixels kept free along the frame
_GAP = 3.0  # pixels between figures, so that they stay apart after a lossy autoencoder
_RELATION_OFFSET = 12.0
_RELATION_DOMINANCE = 1.5
# Half width and half height for a radius of 1, chosen so that areas look alike.
HALF_EXTENTS = {
    "circle": (1.0, 1.0),
    "square": (0.88, 0.88),
    "triangle": (1.1, 0.97),
    "diamond": (0.95, 1.15),
    "cross": (1.05, 1.05),
    "ring": (1.08, 1.08),
}
_ARM = 0.36  # half width of the cross's arms
_HOLE = 0.58  # inner radius of the ring


@dataclass(frozen=True)
class Requirement:
    """What a prompt demands of one kind of object.

    Attributes:
        shape: One of `SHAPES`.
        count: How many of them.
        color: One of `COLORS`, or None where any will do.
        position: Relation and index of the requirement it relates to, as in `("left of", 0)`.
    """

    shape: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption with its task and its meaning."""

    text: str
    task: str
    include: tuple[Requirement, ...]

    def to_metadata(self) -> dict[str, Any]:
        """Returns the prompt as a line of GenEval's `evaluation_metadata.jsonl`."""
        include: list[dict[str, Any]] = []
        for requirement in self.include:
            entry: dict[str, Any] = {"class": requirement.shape, "count": requirement.count}
            if requirement.color is not None:
                entry["color"] = requirement.color
            if requirement.position is not None:
                entry["position"] = list(requirement.position)
            include.append(entry)
        metadata: dict[str, Any] = {"tag": _GENEVAL_TAGS.get(self.task, self.task)}
        metadata["include"] = include
        if self.task == "counting":
            metadata["exclude"] = [{"class": r.shape, "count": r.count + 1} for r in self.include]
        return metadata | {"prompt": self.text}


@dataclass(frozen=True)
class Figure:
    """One coloured shape; `x`, `y` is the middle of its bounding box, in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def half_extents(self) -> tuple[float, float]:
        """Half the width and half the height, in pixels."""
        width, height = HALF_EXTENTS[self.shape]
        return width * self.radius, height * self.radius


@dataclass(frozen=True)
class Scene:
    """Figures on a plain ground, one of `GROUNDS`."""

    figures: tuple[Figure, ...]
    ground: str


def _phrase(shape: str, color: str | None = None) -> str:
    noun = shape if color is None else f"{color} {shape}"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _enumerate(task: str) -> Iterator[Prompt]:
    pairs = list(permutations(SHAPES, 2))
    if task == "single_object":
        for shape in SHAPES:
            yield Prompt(_phrase(shape), task, (Requirement(shape),))
    elif task == "two_objects":
        for a, b in pairs:
            text = f"{_phrase(a)} and {_phrase(b)}"
            yield Prompt(text, task, (Requirement(a), Requirement(b)))
    elif task == "counting":
        for word, count in COUNTS.items():
            for shape in SHAPES:
                yield Prompt(f"{word} {_plural(shape)}", task, (Requirement(shape, count),))
    elif task == "colors":
        for color in COLORS:
            for shape in SHAPES:
                yield Prompt(_phrase(shape, color), task, (Requirement(shape, color=color),))
    elif task == "position":
        for relation in RELATIONS:
            for a, b in pairs:
                text = f"{_phrase(a)} {relation} {_phrase(b)}"
                # GenEval lists the landmark first and gives the position to the other object.
                yield Prompt(text, task, (Requirement(b), Requirement(a, position=(relation, 0))))
    elif task == "color_attribution":
        for a, b in pairs:
            for p, q in permutations(COLORS, 2):
                text = f"{_phrase(a, p)} and {_phrase(b, q)}"
                yield Prompt(text, task, (Requirement(a, color=p), Requirement(b, color=q)))
    else:
        raise ValueError(f"no task {task!r} in the shapes world: it has {', '.join(TASKS)}")


@lru_cache
def all_prompts(task: str) -> tuple[Prompt, ...]:
    """Returns every prompt of a task, in a fixed order."""
    return tuple(_enumerate(task))


@lru_cache
def _by_text() -> dict[str, Prompt]:
    return {prompt.text: prompt for task in TASKS for prompt in all_prompts(task)}


def parse(text: str) -> Prompt:
    """Returns the prompt that a text says; case, outer spaces and a full stop do not matter.

    Raises:
        ValueError: The text is not in the grammar.
    """
    key = " ".join(text.lower().split()).removesuffix(".").rstrip()
    prompt = _by_text().get(key)
    if prompt is None:
        raise ValueError(
            f"cannot read {text!r} as a prompt of the shapes world, whose grammar is 'a [color] "
            "shape', 'two|three|four shapes', 'a shape left of|right of|above|below a shape' and "
            "'a [color] shape and a [color] shape' (both or neither coloured, shapes and colors "
            f"different), with shapes {', '.join(SHAPES)} and colors {', '.join(COLORS)}"
        )
    return prompt


def _meaning(prompt: Prompt) -> str:
    """Returns one text for all prompts that mean the same: "a and b" is "b and a"."""
    mirrored = {"and": "and", "left of": "right of", "above": "below"}
    mirrored |= {value: key for key, value in mirrored.items()}
    for joint, opposite in mirrored.items():
        first, found, second = prompt.text.partition(f" {joint} ")
        if found:
            return min(prompt.text, f"{second} {opposite} {first}")
    return prompt.text


@lru_cache
def split_prompts(split: Split) -> tuple[Prompt, ...]:
    """Returns the prompts of a split, about 70, 10 and 20 % of every task.

    Prompts that mean the same ("a ring and a cross", "a cross and a ring") share a split, so what
    is held out is held out in meaning.
    """
    chosen: list[Prompt] = []
    for task in TASKS:
        meanings = sorted({_meaning(prompt) for prompt in all_prompts(task)})
        random.Random(_SPLIT_SEED).shuffle(meanings)
        num_val, num_test = (max(1, round(f * len(meanings))) for f in (0.1, 0.2))
        parts = {
            "val": meanings[:num_val],
            "test": meanings[num_val : num_val + num_test],
            "train": meanings[num_val + num_test :],
        }
        if split not in parts:
            raise ValueError(f"no split {split!r} of the prompts: there are train, val and test")
        kept = set(parts[split])
        chosen += [prompt for prompt in all_prompts(task) if _meaning(prompt) in kept]
    return tuple(chosen)


def compose(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """Draws a random scene that shows what the prompt demands and nothing else."""
    wanted = [requirement for requirement in prompt.include for _ in range(requirement.count)]
    colors = _draw_colors(wanted, rng)
    relation = None
    if prompt.task == "position":
        relation = next(r.position[0] for r in wanted if r.position is not None)
    centres, radii = _place([requirement.shape for requirement in wanted], relation, rng)
    figures = tuple(
        Figure(requirement.shape, color, float(centre[0]), float(centre[1]), float(radius))
        for requirement, color, centre, radius in zip(wanted, colors, centres, radii, strict=True)
    )
    return Scene(figures, tuple(GROUNDS)[rng.integers(len(GROUNDS))])


def _draw_colors(wanted: Sequence[Requirement], rng: np.random.Generator) -> list[str]:
    names = list(COLORS)
    if len({requirement.shape for requirement in wanted}) == 1:
        # Several figures of one shape: as often one colour for all as one for each.
        drawn = rng.integers(len(names), size=len(wanted))
        if rng.random() < 0.5:
            drawn[:] = drawn[0]
    else:
        drawn = rng.permutation(len(names))[: len(wanted)]
    return [r.color or names[i] for r, i in zip(wanted, drawn, strict=True)]


def _place(
    shapes: Sequence[str], relation: str | None, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draws centres [n, 2] and radii [n] by rejection, many candidates at a time."""
    count = len(shapes)
    low, high = {1: (9.0, 14.0), 2: (9.0, 13.0)}.get(count, (7.0, 9.0))
    unit = np.array([HALF_EXTENTS[shape] for shape in shapes])
    num_candidates = 1 if count == 1 else 48
    while True:
        radii = rng.uniform(low, high, (num_candidates, count))
        half = radii[..., None] * unit  # [candidate, n, 2]
        border = half + _MARGIN
        centres = border + rng.random(half.shape) * (SIZE - 2 * border)
        fits = np.ones(num_candidates, bool)
        for i, j in combinations(range(count), 2):
            offset = np.abs(centres[:, i] - centres[:, j])
            # Bounding boxes apart along one axis, which is stricter than figures apart.
            fits &= (offset - half[:, i] - half[:, j]).max(-1) >= _GAP
        if relation is not None:
            fits &= _related(centres[:, 1] - centres[:, 0], relation)
        if fits.any():
            first = int(fits.argmax())
            return centres[first], radii[first]


def _related(offset: NDArray[np.float64], relation: str) -> NDArray[np.bool_]:
    axis, sign = RELATIONS[relation]
    along, across = sign * offset[:, axis], np.abs(offset[:, 1 - axis])
    related: NDArray[np.bool_] = (along > _RELATION_OFFSET) & (along > _RELATION_DOMINANCE * across)
    return related


def signed_distance(
    shape: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Returns the distance to a shape's outline, negative inside, for offsets from its middle."""
    width, height = (extent * radius for extent in HALF_EXTENTS[shape])
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(ax, ay) - width
    elif shape == "triangle":
        # Apex (0, -height), base from (-width, height) to (width, height).
        slanted = (2 * height * ax - width * (y + height)) / np.hypot(2 * height, width)
        distance = np.maximum(slanted, y - height)
    elif shape == "diamond":
        distance = (ax * height + ay * width - width * height) / np.hypot(width, height)
    elif shape == "cross":
        long, short = np.maximum(ax, ay), np.minimum(ax, ay)
        distance = np.maximum(long - width, short - _ARM * radius)
    elif shape == "ring":
        middle, thickness = (width + _HOLE * radius) / 2, (width - _HOLE * radius) / 2
        distance = np.abs(np.hypot(x, y) - middle) - thickness
    else:
        raise ValueError(f"no shape {shape!r} in the shapes world: it has {', '.join(SHAPES)}")
    result: NDArray[np.float64] = distance
    return result


def render(scene: Scene, size: int = SIZE) -> Picture:
    """Paints a scene as an RGB picture [size, size, 3], anti-aliased."""
    scale = size / SIZE
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = GROUNDS[scene.ground]
    for figure in scene.figures:
        width, height = figure.half_extents
        left, right = _span(figure.x, width, scale, size)
        top, bottom = _span(figure.y, height, scale, size)
        # Coverage of a pixel by a half plane is its clipped distance, to within a few per cent.
        x = np.arange(left, right, dtype=np.float64)[None, :] + 0.5 - figure.x * scale
        y = np.arange(top, bottom, dtype=np.float64)[:, None] + 0.5 - figure.y * scale
        distance = signed_distance(figure.shape, x, y, figure.radius * scale)
        cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)[..., None]
        region = picture[top:bottom, left:right]
        region += cover * (np.array(COLORS[figure.color], np.float32) - region)
    return (picture + 0.5).astype(np.uint8)


def _span(centre: float, half: float, scale: float, size: int) -> tuple[int, int]:
    low, high = (centre - half) * scale - 1, (centre + half) * scale + 2
    return max(0, int(low)), min(size, int(high))


def sample(rng: np.random.Generator, prompts: Sequence[Prompt]) -> tuple[Prompt, Picture]:
    """Draws a task uniformly among those of `prompts`, one of its prompts, and a picture of it."""
    if not prompts:
        raise ValueError("cannot draw a picture: prompts is empty")
    # The first task of a random order that occurs is uniform over those that occur.
    for index in rng.permutation(len(TASKS)):
        candidates = [prompt for prompt in prompts if prompt.task == TASKS[index]]
        if candidates:
            break
    prompt = candidates[rng.integers(len(candidates))]
    return prompt, render(compose(prompt, rng))
