"""Trains the small CLIP of the shapes model: how well a picture fits a caption, as a number.

    python -m domains.text_to_image.train.clip --steps 6000 --seed 0

Half of the batches hold one task only, so that colours, counts and relations must be told apart,
and bring captions with the same words in another order as further negatives. A caption that is
true of a picture is never a negative: of the picture's own task it is a positive, of another task
("a circle" for the picture of "a red circle") it is left out.

Contrast alone sees colours at once and shapes very late. So the vision tower is first taught, and
later reminded, what lies under each patch, by a linear head that is thrown away.

References:
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021),
    https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from domains.text_to_image import EMBEDDED
from domains.text_to_image.shapes.world import (
    COLORS,
    SHAPES,
    SIZE,
    TASKS,
    Prompt,
    Requirement,
    Scene,
    all_prompts,
    compose,
    render,
    split_prompts,
)
from domains.text_to_image.train.common import (
    arguments,
    pixels_of,
    save_half,
    update_average,
    warm_up_cosine,
)

LEARNING_RATE = 2e-3
# Of the updates, those that precede the contrast; they see pictures only, half as many each.
LOCAL_SHARE = 0.4
PROJECTION = 64
NUM_TEXTS = 192
# What the pixels in [0, 1] are normalised with.
MEAN, STD = 0.5, 0.5

Meaning = tuple[Requirement, ...]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained two-tower model of well under a million parameters."""
    text = {
        "projection_dim": PROJECTION,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "projection_dim": PROJECTION,
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))
    with torch.no_grad():
        # As loud as the patches, or positions go unheard for long.
        clip.vision_model.embeddings.position_embedding.weight *= 10
    return clip


def meanings(scene: Scene) -> set[Meaning]:
    """What a prompt may demand (its `include`) to be true of a scene."""
    shapes = [figure.shape for figure in scene.figures]
    true: set[Meaning] = {(Requirement(shape, shapes.count(shape)),) for shape in shapes}
    true |= {(Requirement(shape),) for shape in shapes}
    true |= {(Requirement(figure.shape, color=figure.color),) for figure in scene.figures}
    for a, b in permutations(scene.figures, 2):
        if a.shape == b.shape:
            continue
        true.add((Requirement(a.shape), Requirement(b.shape)))
        colors = Requirement(a.shape, color=a.color), Requirement(b.shape, color=b.color)
        true.add(colors)
        dx, dy = a.x - b.x, a.y - b.y
        if abs(dx) > abs(dy):
            relation = "left of" if dx < 0 else "right of"
        else:
            relation = "above" if dy < 0 else "below"
        true.add((Requirement(b.shape), Requirement(a.shape, position=(relation, 0))))
    return true


def relations(
    own: Sequence[Prompt], scenes: Sequence[Scene], texts: Sequence[Prompt]
) -> tuple[Tensor, Tensor]:
    """Which texts are positives of which pictures, and which may not be compared; `[B, T]` both."""
    true = [meanings(scene) for scene in scenes]
    holds = torch.tensor([[text.include in known for text in texts] for known in true])
    same_task = torch.tensor([[text.task == prompt.task for text in texts] for prompt in own])
    return holds & same_task, holds & ~same_task


def contrastive_loss(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, with the target shared evenly among several positives."""
    logits = logits.masked_fill(ignored, -1e4)
    losses = []
    for scores, target in ((logits, positive), (logits.T, positive.T)):
        # A text without a picture in the batch (a hard negative) asks nothing of its own.
        asked = target.any(1)
        weights = target[asked].float()
        log_probs = scores[asked].log_softmax(1)
        losses.append(-(weights * log_probs).sum(1).div(weights.sum(1)).mean())
    return sum(losses[1:], losses[0]) / 2


def local_loss(logits: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Cross-entropy of the shape and the colour whose bounding box a patch's middle lies in."""
    num_patches = math.isqrt(logits.shape[1])
    middles = (np.arange(num_patches) + 0.5) * SIZE / num_patches
    x, y = middles[None, :], middles[:, None]
    labels = np.zeros((2, len(scenes), num_patches, num_patches), np.int64)
    for index, scene in enumerate(scenes):
        for figure in scene.figures:
            width, height = figure.half_extents
            inside = (abs(x - figure.x) <= width) & (abs(y - figure.y) <= height)
            labels[0, index, inside] = 1 + SHAPES.index(figure.shape)
            labels[1, index, inside] = 1 + list(COLORS).index(figure.color)
    shapes, colors = torch.from_numpy(labels).flatten(1)
    by_shape, by_color = logits.flatten(0, 1).tensor_split([1 + len(SHAPES)], dim=1)
    loss: Tensor = functional.cross_entropy(by_shape, shapes)
    return loss + functional.cross_entropy(by_color, colors)


class Batches:
    """Pictures with their prompts, and the texts that they are compared with."""

    def __init__(self, prompts: Sequence[Prompt], rng: np.random.Generator) -> None:
        """Sort the prompts by task, and by the words that they are made of."""
        self.rng = rng
        self.by_task = [[p for p in prompts if p.task == task] for task in TASKS]
        self.by_words: dict[tuple[str, ...], list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            self.by_words[self._words(prompt)].append(prompt)

    @staticmethod
    def _words(prompt: Prompt) -> tuple[str, ...]:
        return tuple(sorted(prompt.text.split()))

    def pick(self, num_pictures: int) -> list[Prompt]:
        """Prompts of one task or, as often, of all."""
        # A task with more to tell apart gets more of the batches.
        weights = np.sqrt([len(prompts) for prompts in self.by_task])
        tasks = self.rng.choice(len(TASKS), num_pictures, p=weights / weights.sum())
        if self.rng.random() < 0.5:
            tasks[:] = tasks[0]
        return [self.by_task[t][self.rng.integers(len(self.by_task[t]))] for t in tasks]

    def texts(self, own: Sequence[Prompt]) -> list[Prompt]:
        """The different ones of these prompts, and others made of the same words."""
        anagrams = [other for prompt in own for other in self.by_words[self._words(prompt)]]
        return list(dict.fromkeys([*own, *anagrams]))[:NUM_TEXTS]


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The text tower's input."""
    return dict(tokenizer([p.text for p in prompts], padding=True, return_tensors="pt"))


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """The vision tower's input, `[B, 3, 64, 64]`."""
    return (pixels_of([render(scene) for scene in scenes]) - MEAN) / STD


@torch.no_grad()
def ranking_accuracy(
    clip: CLIPModel, tokenizer: CLIPTokenizer, task: str, *, num_pictures: int, seed: int
) -> float:
    """How often the true caption beats three false ones of its task, on held-out prompts."""
    rng = np.random.default_rng(seed)
    prompts = [prompt for prompt in split_prompts("test") if prompt.task == task]
    own = [prompts[i] for i in rng.integers(len(prompts), size=num_pictures)]
    scenes = [compose(prompt, rng) for prompt in own]
    candidates = all_prompts(task)
    inputs = tokens(tokenizer, candidates)
    logits = clip(pixel_values=pixel_values(scenes), **inputs).logits_per_image
    correct = 0
    for row, prompt, scene in zip(logits, own, scenes, strict=True):
        known = meanings(scene)
        false = [i for i, other in enumerate(candidates) if other.include not in known]
        others = row[rng.choice(false, 3, replace=False)]
        correct += bool(row[candidates.index(prompt)] > others.max())
    return correct / num_pictures


def save(clip: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write weights, tokenizer files and the picture processor's settings."""
    save_half(clip, out)
    for path in Path(tokenizer.name_or_path).iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    # By hand, because transformers' own picture processor may ask for torchvision.
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (out / "preprocessor_config.json").write_text(text, encoding="utf-8")


def optimise(
    modules: nn.Module, loss: Callable[[], Tensor], num_steps: int, average: nn.Module | None = None
) -> None:
    """Minimise a loss that draws its own batches; `average` follows the weights."""
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = warm_up_cosine(optimizer, num_steps)
    progress = trange(num_steps, mininterval=5)
    for _ in progress:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            update_average(average, modules)
        progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)


def train(out: Path, num_steps: int, batch_size: int, seed: int) -> None:
    """Train, write the averaged weights, report the held-out ranking accuracy of each task."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "shapes" / "tokenizer")
    batches = Batches(split_prompts("train"), rng)
    clip = build_clip(tokenizer)
    head = nn.Linear(clip.config.vision_config.hidden_size, len(SHAPES) + len(COLORS) + 2)

    def local() -> Tensor:
        scenes = [compose(prompt, rng) for prompt in batches.pick(batch_size // 2)]
        outputs = clip.vision_model(pixel_values=pixel_values(scenes))
        return local_loss(head(outputs.last_hidden_state[:, 1:]), scenes)

    def joint() -> Tensor:
        own = batches.pick(batch_size)
        scenes, texts = [compose(prompt, rng) for prompt in own], batches.texts(own)
        outputs = clip(pixel_values=pixel_values(scenes), **tokens(tokenizer, texts))
        hidden = outputs.vision_model_output.last_hidden_state[:, 1:]
        contrast = contrastive_loss(outputs.logits_per_image, *relations(own, scenes, texts))
        return contrast + local_loss(head(hidden), scenes)

    optimise(nn.ModuleList([clip.vision_model, head]), local, round(LOCAL_SHARE * num_steps))
    modules = nn.ModuleList([clip, head])
    average = copy.deepcopy(modules)
    optimise(modules, joint, num_steps - round(LOCAL_SHARE * num_steps), average)
    clip.load_state_dict(average[0].state_dict())
    save(clip.eval(), tokenizer, out)
    for task in TASKS:
        accuracy = ranking_accuracy(clip, tokenizer, task, num_pictures=500, seed=1)
        print(f"{task}: {accuracy:.3f}")


if __name__ == "__main__":
    options = arguments(
        "Train the shapes model's CLIP.",
        out=EMBEDDED / "shapes_clip",
        num_steps=6000,
        batch_size=64,
    )
    train(options.out, options.steps, options.batch_size, options.seed)
