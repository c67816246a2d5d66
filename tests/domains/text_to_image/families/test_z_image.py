"""What Z-Image alone has: captions of their own lengths, c + w (c - u), a number of places."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from domains.text_to_image.families import FAMILIES, Family
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.families.tiny import tiny

LENGTHS = {"": 19, "a red ring": 29, "a blue square below": 38, "word " * 12: 79}
"""Tokens with the chat around them, for one, two and three times 32 places; a byte is one."""
SHORT = list(LENGTHS)[:3]
SIZE = {"height": 32, "width": 48}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "zimage"
    tiny("zimage").save_pretrained(path)
    return path


def family_of(parts: Any, **options: Any) -> Family:
    return FAMILIES["ZImagePipeline"](parts, (32, 32), **options)


def noise(pipeline: TextToImagePipeline, number: int) -> Tensor:
    shape = (number, 16, *pipeline.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_a_row_is_the_caption_alone_whatever_its_batch() -> None:
    family = family_of(tiny("zimage"), max_sequence_length=96)
    prompts = list(LENGTHS)
    rows = family.encode(prompts)["embedding"]
    assert prompts == list(LENGTHS)  # diffusers would have written into the list
    assert tuple(rows.shape[1:]) == family.encoded_shapes()["embedding"]
    assert rows[..., -1].sum(dim=1).tolist() == list(LENGTHS.values())
    captions, _ = family.parts.encode_prompt(list(prompts))
    for row, prompt, caption in zip(rows, prompts, captions, strict=True):
        (alone,) = family.encode([prompt])["embedding"]
        torch.testing.assert_close(alone, row, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(row[: len(caption), :-1], caption, atol=1e-6, rtol=1e-5)
        assert not row[len(caption) :].any()


@torch.no_grad()
def test_a_prediction_does_not_depend_on_longer_captions_beside_it(folder: Path) -> None:
    pipeline = TextToImagePipeline(str(folder), max_sequence_length=96, **SIZE)
    condition = pipeline.encode({"prompt": list(LENGTHS)})
    x, t = noise(pipeline, len(LENGTHS)), torch.linspace(0.2, 0.9, len(LENGTHS))
    together = pipeline(x, t, condition)
    for i in range(len(LENGTHS)):
        alone = pipeline(x[i : i + 1], t[i : i + 1], condition.index(slice(i, i + 1)))
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "negative"),
    [
        (0.5, "dull, " * 9),
        pytest.param(0.0, None, marks=SLOW),
        pytest.param(0.5, None, marks=SLOW),
        pytest.param(4.0, None, marks=SLOW),
        pytest.param(4.0, "dull, " * 9, marks=SLOW),
    ],
)
def test_guidance_scale_means_what_it_means_in_diffusers(
    folder: Path, guidance: float, negative: str | None
) -> None:
    """Also w between 0 and 1, which is guidance there; pictures are oblong."""
    pipeline = TextToImagePipeline(
        str(folder), guidance_scale=guidance, negative_prompt=negative, **SIZE
    )
    condition, z = pipeline.encode({"prompt": list(SHORT)}), noise(pipeline, len(SHORT))
    with torch.no_grad():
        x = Sampler(num_steps=2).sample(pipeline, pipeline.process, z, condition)
        pictures = pipeline.decode(x, condition)
    plain: Any = ZImagePipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        list(SHORT),
        negative_prompt=None if negative is None else [negative] * len(SHORT),
        guidance_scale=guidance,
        num_inference_steps=2,
        latents=z.clone(),
        output_type="pt",
        **SIZE,
    ).images
    assert float(expected.std()) > 0.02
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    pipe: Any = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("normalization", "truncation"),
    [
        (1.0, None),
        (0.7, 0.5),
        pytest.param(0.0, 0.25, marks=SLOW),
        pytest.param(1.2, 0.0, marks=SLOW),
    ],
)
def test_normalised_and_truncated_guidance_is_that_of_diffusers(
    folder: Path, plain: Any, normalization: float, truncation: float | None
) -> None:
    pipeline = TextToImagePipeline(
        str(folder),
        guidance_scale=4.0,
        cfg_normalization=normalization,
        cfg_truncation=truncation,
        **SIZE,
    )
    condition, z = pipeline.encode({"prompt": list(SHORT)}), noise(pipeline, len(SHORT))
    with torch.no_grad():
        latents = Sampler(num_steps=4).sample(pipeline, pipeline.process, z, condition)
    settings: dict[str, Any] = {"cfg_normalization": normalization}
    if truncation is not None:
        settings["cfg_truncation"] = truncation
    given = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent", **SIZE}
    expected = plain(list(SHORT), latents=z.clone(), **settings, **given).images
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=1e-4)
    without = plain(list(SHORT), latents=z.clone(), **given).images
    assert (without - expected).abs().max() > 1e-2


@SLOW
def test_long_prompts_end_where_diffusers_ends_them(folder: Path) -> None:
    family = family_of(ZImagePipeline.from_pretrained(folder), max_sequence_length=40)
    (row,) = family.encode(["word " * 40])["embedding"]
    (caption,), _ = family.parts.encode_prompt(["word " * 40], max_sequence_length=40)
    assert len(caption) == 40
    torch.testing.assert_close(row[:, :-1], caption)


def test_the_encoder_sees_each_prompt_once(folder: Path) -> None:
    pipeline = TextToImagePipeline(str(folder), **SIZE)
    rows: list[int] = []

    def note(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        rows.append(len(named["input_ids"]))

    pipeline.diffusers.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    condition = pipeline.encode({"prompt": ["a ring", "a square", "a ring", "a ring"]})
    assert rows == [3] and condition.rows.tolist() == [0, 1, 0, 0]  # the negative prompt is last


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(["*.json", "*.jinja"], marks=SLOW),
        ["*/config.json", "*_config.json", "model_index.json"],
    ],
)
def test_without_weights_there_are_shapes(folder: Path, tmp_path: Path, files: list[str]) -> None:
    """From the configs alone, with the tokenizer's files and without."""
    for path in [path for pattern in files for path in folder.rglob(pattern)]:
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with without_weights():
        pipeline = TextToImagePipeline(str(tmp_path), **SIZE)
        condition = pipeline.encode({"prompt": list(LENGTHS)})
        x = pipeline.blank(condition).to("meta")
        prediction = pipeline(x, torch.full((len(x),), 0.5, device="meta"), condition)
    assert prediction.is_meta and prediction.shape == x.shape
    assert pipeline.features(condition).shape == (len(LENGTHS), 17)


def changed(change: str) -> ZImagePipeline:
    """Return a model that is not supported."""
    parts: Any = tiny("zimage")
    if change == "chat":
        parts.tokenizer.chat_template = None
    elif change == "tokenizer":
        parts.tokenizer = None
    elif change == "vocabulary":
        parts.tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    elif change == "width":
        parts.transformer.register_to_config(cap_feat_dim=12)
    elif change == "patches":
        parts.transformer.register_to_config(all_patch_size=[4])
    return parts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("chat", "no chat template; copy chat_template.jinja"),
        ("tokenizer", "it has no tokenizer"),
        ("vocabulary", "has 268 tokens, its text encoder 264"),
        ("width", "text features of 12 numbers, its text encoder makes 16"),
        ("patches", "no patches of 2 x 2 latents"),
    ],
)
def test_models_that_do_not_fit_are_refused(change: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.pretrained: .*{said}"):
        family_of(changed(change))


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        ((2052, 32), {}, r"height is 2052, but .* for 2048 pixels; give at most"),
        ((32, 2052), {}, r"width is 2052, but .* for 2048 pixels; give at most"),
        (
            (32, 32),
            {"max_sequence_length": 1000},
            r"max_sequence_length is 1000, but .* for 992 tokens",
        ),
        ((32, 32), {"true_cfg_scale": 2.0}, "true_cfg_scale does not apply to Z-Image"),
    ],
)
def test_what_has_no_place_is_refused(
    size: tuple[int, int], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.{said}"):
        FAMILIES["ZImagePipeline"](tiny("zimage"), size, **options)


@SLOW
def test_the_longest_captions_have_places() -> None:
    """At the limits that are refused beyond, the network still predicts."""
    parts = tiny("zimage")
    parts.transformer.rope_embedder.axes_lens = [66, 16, 24]
    parts.transformer.register_to_config(axes_lens=[66, 16, 24])
    family = FAMILIES["ZImagePipeline"](parts, (64, 96), max_sequence_length=64)
    tables = family.encode(["word " * 40])
    assert tables["embedding"][..., -1].all()
    x = torch.randn(1, 16, 32, 48)
    with torch.no_grad():
        prediction = family.denoise(family.denoiser, x, torch.tensor([0.5]), tables, 1.0)
    assert prediction.shape == x.shape and bool(prediction.isfinite().all())
