"""The frozen parts of the shapes model as they are stored: what they are for, they do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from domains.text_to_image import EMBEDDED as ASSETS
from domains.text_to_image.shapes.detector import judge
from domains.text_to_image.shapes.world import SHAPES as SHAPE_NAMES
from domains.text_to_image.shapes.world import TASKS, all_prompts, parse, split_prompts
from domains.text_to_image.train import clip as train_clip
from domains.text_to_image.train import make_tokenizer
from domains.text_to_image.train import relations as train_relations
from domains.text_to_image.train.autoencoder import reconstruct
from domains.text_to_image.train.common import draw

SHAPES, CLIP = ASSETS / "shapes", ASSETS / "shapes_clip"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(SHAPES / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(CLIP).float().eval()


def test_every_word_of_the_grammar_is_one_token_and_survives(tokenizer: CLIPTokenizer) -> None:
    captions = [prompt.text for task in TASKS for prompt in all_prompts(task)]
    encoded = tokenizer(captions).input_ids
    assert [len(ids) - 2 for ids in encoded] == [len(caption.split()) for caption in captions]
    assert max(map(len, encoded)) <= tokenizer.model_max_length == 16
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == captions


def test_other_text_encodes(tokenizer: CLIPTokenizer) -> None:
    text = "A Photo of 3 zebras, isn't it?"
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")
    # Outside ASCII a character is unknown, not an error.
    assert tokenizer.unk_token_id in tokenizer("ein weißer Kreis").input_ids


def test_padding_and_truncation(tokenizer: CLIPTokenizer) -> None:
    texts = ["", "a ring", "a ring and " * 9]
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert encoded.input_ids.shape == (3, tokenizer.model_max_length)
    assert (encoded.input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert (encoded.input_ids[:, -1] == tokenizer.eos_token_id).all()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    make_tokenizer.write_tokenizer(tmp_path)
    for stored in (SHAPES / "tokenizer").iterdir():
        assert (tmp_path / stored.name).read_text() == stored.read_text(), stored.name


def test_the_autoencoder_keeps_held_out_pictures(autoencoder: AutoencoderKL) -> None:
    prompts, pictures = draw(np.random.default_rng(3), split_prompts("test"), 256)
    decoded, latents = reconstruct(autoencoder, pictures)
    assert latents.shape == (256, 4, 8, 8)
    assert (decoded - pictures).abs().mean() < 0.01
    correct = [
        judge(picture, prompt).correct
        for picture, prompt in zip(decoded.permute(0, 2, 3, 1).numpy(), prompts, strict=True)
    ]
    assert np.mean(correct) > 0.95


def test_scaled_latents_have_unit_variance(autoencoder: AutoencoderKL) -> None:
    _, pictures = draw(np.random.default_rng(4), split_prompts("test"), 256)
    latents = reconstruct(autoencoder, pictures)[1] * autoencoder.config.scaling_factor
    assert latents.std() == pytest.approx(1, abs=0.05)
    assert latents.mean((0, 2, 3)).abs().max() < 0.5


@pytest.mark.parametrize("task", TASKS)
def test_clip_prefers_the_true_caption(
    clip: CLIPModel, tokenizer: CLIPTokenizer, task: str
) -> None:
    accuracy = train_clip.ranking_accuracy(clip, tokenizer, task, num_pictures=100, seed=2)
    assert accuracy > 0.8


def test_clip_brings_its_tokenizer_and_picture_settings(clip: CLIPModel) -> None:
    for stored in (SHAPES / "tokenizer").iterdir():
        assert (CLIP / stored.name).read_text() == stored.read_text(), stored.name
    settings = json.loads((CLIP / "preprocessor_config.json").read_text())
    assert settings["crop_size"]["height"] == clip.config.vision_config.image_size
    assert settings["image_mean"] == [train_clip.MEAN] * 3
    assert settings["image_std"] == [train_clip.STD] * 3


def test_assets_are_small_and_stored_in_half_precision() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert weights
    for path in weights:
        with safe_open(path, "pt") as stored:
            kinds = {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, f"{path.relative_to(ASSETS)}: {kinds}"


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def with_the_opposite_relation(text: str) -> str:
    relation = next(relation for relation in OPPOSITE if f" {relation} " in text)
    return text.replace(relation, OPPOSITE[relation])


def test_the_sides_of_a_caption() -> None:
    circle, square = SHAPE_NAMES.index("circle"), SHAPE_NAMES.index("square")
    none = train_relations.NO_SHAPE
    for text, sides in {
        "a circle left of a square": [circle, square, none, none],
        "a square right of a circle": [circle, square, none, none],
        "a circle above a square": [none, none, circle, square],
        "a circle below a square": [none, none, square, circle],
        "a circle and a square": [none] * 4,
    }.items():
        assert train_relations.sides(parse(text)) == sides, text


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(SHAPES / "text_encoder", torch_dtype=torch.float32).eval()


@torch.no_grad()
def test_the_encoder_says_what_is_on_which_side(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    # A read-out by least squares, fitted on the training captions, names held-out ones' sides.
    states, wanted = {}, {}
    for split in ("train", "test"):
        prompts = [prompt for prompt in split_prompts(split) if prompt.task == "position"]
        pooled = train_relations.padding_states(encoder, tokenizer, prompts)
        states[split] = torch.cat([pooled, torch.ones(len(prompts), 1)], 1).double()
        sides = train_relations.sides_of(prompts)
        wanted[split] = torch.nn.functional.one_hot(sides, train_relations.NO_SHAPE + 1).double()
    read = torch.linalg.lstsq(states["train"], wanted["train"].flatten(1)).solution
    named = (states["test"] @ read).view_as(wanted["test"]).argmax(-1)
    right = (named == wanted["test"].argmax(-1)).double().mean()
    assert right > 0.85  # 0.45 before the encoder was taught, 0.93 after


@torch.no_grad()
def test_the_model_reads_relations(
    autoencoder: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Where positions are decided, the opposite relation in the caption raises the loss."""
    unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(SHAPES / "scheduler")
    related = [prompt for prompt in split_prompts("test") if prompt.task == "position"]
    prompts, pictures = draw(np.random.default_rng(5), related, 96)
    latents = autoencoder.encode(2 * pictures - 1).latent_dist.mean
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    t = torch.full((96,), 600)
    x_t = scheduler.add_noise(latents * autoencoder.config.scaling_factor, noise, t)

    def losses(texts: list[str]) -> torch.Tensor:
        asked = train_relations.tokens(tokenizer, [parse(text) for text in texts])
        predicted = unet(x_t, t, encoder(asked).last_hidden_state).sample
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    texts = [prompt.text for prompt in prompts]
    gap = losses([with_the_opposite_relation(text) for text in texts]) - losses(texts)
    assert gap.mean() > 4 * gap.std() / len(gap) ** 0.5
    assert gap.mean() > 5e-4
