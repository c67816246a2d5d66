"""Teaches the text encoder of the shapes model which shape a caption puts on which side.

    python -m domains.text_to_image.train.relations --steps 400 --seed 0

Trained on pictures alone, encoder and U-Net never come to read relations: the U-Net ignores them,
so that the encoder drops them, so that there is nothing to read. Here a linear read-out of the
encoder's padding positions has to name the shape on the left, right, top and bottom; captions
without a relation keep what the encoder said of them before. Afterwards the pretraining goes on
with `configs/experiments/shapes_pretrain_4.yaml`, which has something to read.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from domains.text_to_image import EMBEDDED
from domains.text_to_image.shapes.world import RELATIONS, SHAPES, Prompt, split_prompts
from domains.text_to_image.train.clip import optimise
from domains.text_to_image.train.common import arguments, save_half

SIDES = tuple(RELATIONS)  # opposite ones are neighbours
NO_SHAPE = len(SHAPES)
# The last half of the encoder's 16 positions holds end-of-text tokens alone.
NUM_PADDING = 8
KEEP_WEIGHT = 1.0


def sides(prompt: Prompt) -> list[int]:
    """The number of the shape on the left, on the right, above and below, or `NO_SHAPE`."""
    found = [NO_SHAPE] * len(SIDES)
    for requirement in prompt.include:
        if requirement.position is not None:
            relation, landmark = requirement.position
            side = SIDES.index(relation)
            found[side] = SHAPES.index(requirement.shape)
            found[side ^ 1] = SHAPES.index(prompt.include[landmark].shape)
    return found


def sides_of(prompts: list[Prompt]) -> Tensor:
    """The `sides` of prompts, int64 `[B, 4]`."""
    return torch.tensor([sides(prompt) for prompt in prompts])


def tokens(tokenizer: CLIPTokenizer, prompts: list[Prompt]) -> Tensor:
    """Token numbers `[B, 16]`."""
    texts = [prompt.text for prompt in prompts]
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def padding_states(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompts: list[Prompt]
) -> Tensor:
    """What the encoder says at its padding positions, on average, `[B, F]`."""
    hidden = encoder(tokens(tokenizer, prompts)).last_hidden_state
    return hidden[:, -NUM_PADDING:].mean(1)


def train(out: Path, num_steps: int, batch_size: int, seed: int) -> None:
    """Train, write the encoder, print the read-out's accuracy on held-out captions."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "shapes" / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(
        EMBEDDED / "shapes" / "text_encoder", torch_dtype=torch.float32
    )
    before = copy.deepcopy(encoder).requires_grad_(False)
    head = nn.Linear(encoder.config.hidden_size, len(SIDES) * (NO_SHAPE + 1))
    prompts = split_prompts("train")
    related = [prompt for prompt in prompts if prompt.task == "position"]
    others = [prompt for prompt in prompts if prompt.task != "position"]

    def read(asked: list[Prompt]) -> Tensor:
        return head(padding_states(encoder, tokenizer, asked)).view(-1, NO_SHAPE + 1)

    def loss() -> Tensor:
        asked = rng.choices(related, k=batch_size // 2)
        kept = tokens(tokenizer, rng.choices(others, k=batch_size // 2))
        change = encoder(kept).last_hidden_state - before(kept).last_hidden_state
        named = functional.cross_entropy(read(asked), sides_of(asked).flatten())
        return named + KEEP_WEIGHT * change.square().mean()

    optimise(nn.ModuleList([encoder, head]), loss, num_steps)
    held_out = [prompt for prompt in split_prompts("test") if prompt.task == "position"]
    with torch.no_grad():
        named = read(held_out).argmax(-1)
    right = (named == sides_of(held_out).flatten()).float().mean()
    print(f"held-out captions: {right:.1%} of the sides named right")
    save_half(encoder, out)


if __name__ == "__main__":
    options = arguments(
        "Teach the shapes model's text encoder the sides that captions name.",
        out=EMBEDDED / "shapes" / "text_encoder",
        num_steps=400,
        batch_size=128,
    )
    train(options.out, options.steps, options.batch_size, options.seed)
