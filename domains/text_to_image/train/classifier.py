"""Trains the classifier of the shapes world: does this picture show this prompt, yes or no.

    python -m domains.text_to_image.train.classifier --steps 3500 --seed 0

Half of the questions show a scene that the prompt is true of, the others a near miss: a wrong
shape, colour or relation, swapped colours, a figure more or fewer. True means that the picture
shows what the prompt demands and nothing else, as `compose` draws it; no detector has a say.
Further pictures lie between a true scene and a near miss, with answers in between: without them
halfway is as wrong as the near miss, and the gradient at it leads nowhere.

So that answers hold for the soft pictures of a diffusion model, pictures are bent, blurred, shaded
and made noisy, and many have been through the autoencoder with noise on their latents.

As for the CLIP, a further loss asks what lies at each place.

References:
    Evaluating Text-to-Visual Generation with Image-to-Text Generation (Lin et al., 2024),
    https://arxiv.org/abs/2404.01291
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from domains.text_to_image import EMBEDDED
from domains.text_to_image.shapes.classifier import Classifier, encode
from domains.text_to_image.shapes.world import (
    COLORS,
    RELATIONS,
    SHAPES,
    TASKS,
    Figure,
    Picture,
    Prompt,
    Requirement,
    Scene,
    compose,
    render,
    split_prompts,
)
from domains.text_to_image.train.clip import local_loss, meanings, optimise
from domains.text_to_image.train.common import arguments, pixels_of

# Of a batch, the pictures that have been through the autoencoder, and those of them that are new:
# the round trip costs more than the training step, so each is used a few times.
SOFT_SHARE, NEW_SHARE = 0.3, 0.06
NUM_REMEMBERED = 2048
MAX_LATENT_NOISE = 0.35  # in units of the latents' standard deviation
BETWEEN_SHARE = 0.35
MAX_BEND = 1.5  # pixels, times numbers of about 1
LOCAL_WEIGHT = 0.3
NEAR_MISSES = ("shape", "color", "swap", "relation", "more", "fewer")


@dataclass(frozen=True)
class Question:
    """A picture, the prompt asked about, and the answer.

    Attributes:
        picture: uint8 [64, 64, 3].
        prompt: What is asked about.
        answer: How true it is that the picture shows it, in [0, 1].
        scene: What was painted, or None where it is a mixture of two.
    """

    picture: Picture
    prompt: Prompt
    answer: float
    scene: Scene | None


def shows(scene: Scene, prompt: Prompt) -> bool:
    """Whether a scene shows what a prompt demands and nothing else."""
    num_wanted = sum(requirement.count for requirement in prompt.include)
    return prompt.include in meanings(scene) and num_wanted == len(scene.figures)


def near_miss(prompt: Prompt, kind: str, rng: np.random.Generator) -> Prompt | None:
    """A prompt, perhaps outside the grammar, that demands almost the same.

    Args:
        prompt: What to miss.
        kind: One of `NEAR_MISSES`.
        rng: What draws the difference.

    Returns:
        The altered prompt, or None where it has nothing of this kind to alter.
    """
    include = list(prompt.include)
    index = int(rng.integers(len(include)))
    chosen = include[index]
    if kind == "shape":
        include = _with_other_shape(include, index, rng)
    elif kind == "color" and chosen.color is not None:
        include[index] = replace(chosen, color=_other(list(COLORS), chosen.color, rng))
    elif kind == "swap" and len(include) == 2 and chosen.color is not None:
        colors = include[1].color, include[0].color
        include = [replace(r, color=color) for r, color in zip(include, colors, strict=True)]
    elif kind == "relation" and prompt.task == "position":
        assert include[1].position is not None
        relation = _other(list(RELATIONS), include[1].position[0], rng)
        include[1] = replace(include[1], position=(relation, 0))
    elif kind == "more":
        include = _with_extra(include, index, rng)
    elif kind == "fewer" and chosen.count > 1:
        include[index] = replace(chosen, count=chosen.count - 1)
    elif kind == "fewer" and len(include) > 1:
        return replace(prompt, task="single_object", include=(replace(chosen, position=None),))
    else:
        return None
    return replace(prompt, include=tuple(include))


def _with_other_shape(
    include: Sequence[Requirement], index: int, rng: np.random.Generator
) -> list[Requirement]:
    changed = list(include)
    chosen = changed[index]
    changed[index] = replace(chosen, shape=_other(SHAPES, chosen.shape, rng), count=1)
    if chosen.count > 1:
        changed.append(replace(chosen, count=chosen.count - 1))
    return changed


def _with_extra(
    include: Sequence[Requirement], index: int, rng: np.random.Generator
) -> list[Requirement]:
    changed = list(include)
    if rng.random() < 0.5:
        changed[index] = replace(changed[index], count=changed[index].count + 1)
        return changed
    return [*changed, Requirement(str(rng.choice(SHAPES)))]


def _other(values: Sequence[str], known: str, rng: np.random.Generator) -> str:
    return str(rng.choice([value for value in values if value != known]))


def missing_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that almost shows a prompt."""
    while True:
        altered = near_miss(prompt, str(rng.choice(NEAR_MISSES)), rng)
        if altered is None:
            continue
        scene = recolored(compose(altered, rng), altered, rng)
        if not shows(scene, prompt):
            return scene


def showing_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that shows a prompt, now and then one with room left for a further figure."""
    if sum(requirement.count for requirement in prompt.include) < 4 and rng.random() < 0.3:
        # Figures are smaller in company: their size must not give their number away.
        crowded, num_figures = _crowded(prompt, rng)
        scene = replace(crowded, figures=crowded.figures[:num_figures])
    else:
        scene = compose(prompt, rng)
    return recolored(scene, prompt, rng)


def recolored(scene: Scene, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """The scene, or one whose open colours are drawn anew, as often one for all as any for each.

    In `compose` figures of different shapes never share a colour that is left open.
    """
    if rng.random() < 0.6:
        return scene
    wanted = [r.color for r in prompt.include for _ in range(r.count)]
    names = rng.choice(list(COLORS), len(scene.figures))
    if rng.random() < 0.5:
        names[:] = names[0]
    figures = [
        figure if color else replace(figure, color=str(name))
        for figure, color, name in zip(scene.figures, wanted, names, strict=True)
    ]
    return replace(scene, figures=tuple(figures))


def between(prompt: Prompt, rng: np.random.Generator) -> tuple[Picture, float]:
    """A picture on the way from showing a prompt to not quite, and how true it is.

    One figure changes its shape or colour, goes or comes: all of it by a share, or a side of it,
    cut or smudged. With a share u of the picture that shows the prompt the answer is u^2. Where the
    end shows it too (a colour left open), the answer is max(u, 1 - u)^2: a figure has one colour.
    """
    scene, changed, figure = _two_ends(prompt, rng)
    start, end = (render(s).astype(np.float32) for s in (scene, changed))
    if rng.random() < 0.5:
        part = np.full((len(start), len(start), 1), rng.random())
    else:
        blur = 1.0 if rng.random() < 0.5 else rng.uniform(2, 2 * figure.radius)
        offset = rng.uniform(-1, 1) * figure.radius
        part = _side(figure, offset, blur, rng.uniform(0, 2 * math.pi), len(start))
    difference = np.abs(end - start)
    kept = 1 - float((part * difference).sum() / difference.sum())
    share = max(kept, 1 - kept) if shows(changed, prompt) else kept
    return (start + part * (end - start) + 0.5).astype(np.uint8), share**2


def _two_ends(prompt: Prompt, rng: np.random.Generator) -> tuple[Scene, Scene, Figure]:
    """A scene that shows a prompt, one with another figure in it, and the figure that differs."""
    if rng.random() < 0.25:
        changed, num_figures = _crowded(prompt, rng)
        scene = replace(changed, figures=changed.figures[:num_figures])
        return scene, changed, changed.figures[-1]
    scene = showing_scene(prompt, rng)
    index = int(rng.integers(len(scene.figures)))
    figure, kind = scene.figures[index], rng.integers(3)
    figures = list(scene.figures)
    if kind == 0:
        figures[index] = replace(figure, shape=_other(SHAPES, figure.shape, rng))
    elif kind == 1:
        figures[index] = replace(figure, color=_other(list(COLORS), figure.color, rng))
    else:
        del figures[index]
    return scene, replace(scene, figures=tuple(figures)), figure


def _crowded(prompt: Prompt, rng: np.random.Generator) -> tuple[Scene, int]:
    """A scene with one figure more than a prompt demands, the last, and the number demanded."""
    extra = Requirement(str(rng.choice(SHAPES)))
    scene = compose(replace(prompt, include=(*prompt.include, extra)), rng)
    return scene, len(scene.figures) - 1


def _side(
    figure: Figure, offset: float, blur: float, angle: float, size: int
) -> NDArray[np.float64]:
    """1 beyond a line at a distance from the figure's middle, 0 on this side, [size, size, 1]."""
    y, x = np.mgrid[:size, :size] + 0.5
    distance = (x - figure.x) * math.cos(angle) + (y - figure.y) * math.sin(angle) - offset
    return np.clip(0.5 + distance / blur, 0, 1)[..., None]


def ask(prompt: Prompt, rng: np.random.Generator) -> Question:
    """A question about a prompt, whose answer is as often yes as no, and sometimes in between."""
    if rng.random() < BETWEEN_SHARE:
        picture, answer = between(prompt, rng)
        return Question(picture, prompt, answer, None)
    shown = rng.random() < 0.5
    scene = showing_scene(prompt, rng) if shown else missing_scene(prompt, rng)
    return Question(render(scene), prompt, float(shown), scene)


def pick(prompts: Sequence[Prompt], num: int, rng: np.random.Generator) -> list[Prompt]:
    """Prompts of all tasks alike, but twice as many of counting, which is learned last."""
    by_task = [[p for p in prompts if p.task == task] for task in (*TASKS, "counting")]
    tasks = rng.integers(len(by_task), size=num)
    return [by_task[task][rng.integers(len(by_task[task]))] for task in tasks]


@torch.no_grad()
def round_trip(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] encoded and decoded with noise on the latents."""
    latents = autoencoder.encode(2 * pictures - 1).latent_dist.mode()
    level = torch.rand(len(latents), 1, 1, 1) * MAX_LATENT_NOISE / autoencoder.config.scaling_factor
    decoded = autoencoder.decode(latents + level * torch.randn_like(latents)).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def soften(pictures: Tensor) -> Tensor:
    """Pictures bent by about a pixel, and some of them blurred, shaded and made noisy."""
    num, size = len(pictures), pictures.shape[-1]
    bend = _smooth_noise(num, 2, size).permute(0, 2, 3, 1) * torch.rand(num, 1, 1, 1) * 2 / size
    straight = torch.eye(2, 3).expand(num, 2, 3)
    grid = functional.affine_grid(straight, [num, 3, size, size], align_corners=False)
    pictures = functional.grid_sample(
        pictures, grid + MAX_BEND * bend, padding_mode="border", align_corners=False
    )
    blurred = functional.avg_pool2d(functional.pad(pictures, (1,) * 4, mode="replicate"), 3, 1)
    pictures = pictures.lerp(blurred, _for_some(num))
    pictures = pictures + 0.04 * _for_some(num) * _smooth_noise(num, 3, size)
    return (pictures + 0.04 * _for_some(num) * torch.randn_like(pictures)).clamp(0, 1)


def _for_some(num: int) -> Tensor:
    """Numbers in [0, 1], half of them zero, [num, 1, 1, 1]."""
    return (2 * torch.rand(num, 1, 1, 1) - 1).clamp(min=0)


def _smooth_noise(num: int, channels: int, size: int) -> Tensor:
    coarse = torch.randn(num, channels, 7, 7)
    return functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)


class Batches:
    """Questions with softened pictures."""

    def __init__(
        self, prompts: Sequence[Prompt], autoencoder: AutoencoderKL, rng: np.random.Generator
    ) -> None:
        """Start with nothing remembered."""
        self.prompts, self.autoencoder, self.rng = prompts, autoencoder, rng
        self.remembered: deque[tuple[Tensor, Question]] = deque(maxlen=NUM_REMEMBERED)

    def draw(self, batch_size: int) -> tuple[Tensor, list[Question]]:
        """Pictures [B, 3, 64, 64] in [0, 1] and the questions about them."""
        self._remember(max(1, round(NEW_SHARE * batch_size)))
        num_soft = round(SOFT_SHARE * batch_size)
        rows = self.rng.integers(len(self.remembered), size=num_soft)
        chosen = [self.remembered[row] for row in rows]
        fresh = self._ask(batch_size - num_soft)
        pictures = [pixels_of([question.picture for question in fresh])]
        pictures += [picture[None] for picture, _ in chosen]
        return soften(torch.cat(pictures)), fresh + [question for _, question in chosen]

    def _ask(self, num: int) -> list[Question]:
        return [ask(prompt, self.rng) for prompt in pick(self.prompts, num, self.rng)]

    def _remember(self, num: int) -> None:
        questions = self._ask(num)
        pictures = round_trip(self.autoencoder, pixels_of([q.picture for q in questions]))
        self.remembered.extend(zip(pictures, questions, strict=True))


def codes_of(prompts: Sequence[Prompt]) -> Tensor:
    """The network's codes of prompts, int64 [B, 6]."""
    return torch.stack([encode(prompt) for prompt in prompts])


def question_loss(
    classifier: Classifier, pictures: Tensor, questions: Sequence[Question]
) -> Tensor:
    """Cross-entropy of the answers, and of what lies at each place where that is one thing."""
    features, places = classifier.look(pictures)
    logits = classifier.answers(features, places, codes_of([q.prompt for q in questions]))
    answers = torch.tensor([q.answer for q in questions])
    kept = [i for i, q in enumerate(questions) if q.scene is not None]
    local = local_loss(
        places[kept].flatten(2).transpose(1, 2), [q.scene for q in questions if q.scene is not None]
    )
    answer = functional.binary_cross_entropy_with_logits(logits, answers)
    return answer + LOCAL_WEIGHT * local


@torch.no_grad()
def accuracy(classifier: Classifier, task: str, *, num_pairs: int, seed: int) -> float:
    """The share of right answers on held-out prompts, half yes and half near misses."""
    rng = np.random.default_rng(seed)
    prompts = [prompt for prompt in split_prompts("test") if prompt.task == task]
    asked = [prompts[i] for i in rng.integers(len(prompts), size=num_pairs)]
    correct = 0
    for scenes, answer in (
        ([compose(prompt, rng) for prompt in asked], True),
        ([missing_scene(prompt, rng) for prompt in asked], False),
    ):
        logits = classifier(pixels_of([render(scene) for scene in scenes]), codes_of(asked))
        correct += int(((logits > 0) == answer).sum())
    return correct / (2 * num_pairs)


def train(out: Path, num_steps: int, batch_size: int, seed: int) -> None:
    """Train, write the averaged weights, report the held-out accuracy of each task."""
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL.from_pretrained(EMBEDDED / "shapes" / "vae").float().eval()
    autoencoder.requires_grad_(False).to(memory_format=torch.channels_last)
    batches = Batches(split_prompts("train"), autoencoder, np.random.default_rng(seed))
    classifier = Classifier()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(classifier)

    def loss() -> Tensor:
        return question_loss(classifier, *batches.draw(batch_size))

    optimise(classifier, loss, num_steps, average)
    average.save(out)
    stored = Classifier.load(out)
    for task in TASKS:
        print(f"{task}: {accuracy(stored, task, num_pairs=500, seed=1):.3f}", flush=True)


if __name__ == "__main__":
    options = arguments(
        "Train the shapes world's yes/no classifier.",
        out=EMBEDDED / "shapes_classifier",
        num_steps=3500,
        batch_size=64,
    )
    train(options.out, options.steps, options.batch_size, options.seed)
