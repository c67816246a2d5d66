"""Models without parts that diffusers can do without: pictures are those of its own pipeline."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.families.original import as_one_file, of_two_widths
from tests.domains.text_to_image.families.tiny import tiny

SIZE = {"height": 32, "width": 32}
PROMPTS = ["a red ring", "a blue square below"]
SEEDS = [3, 1]
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@torch.no_grad()
def ours(pipeline: TextToImagePipeline) -> Tensor:
    condition, noise = pipeline.encode({"prompt": PROMPTS}), generators(SEEDS)
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
    x_0 = Sampler(4, 0.0).sample(pipeline, pipeline.process, x_1, condition, noise)
    return pipeline.decode(x_0, condition)


def theirs(plain: Any, shape: tuple[int, ...]) -> Tensor:
    noise = generators(SEEDS)
    z = torch.stack([torch.randn(shape, generator=each) for each in noise])
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    return plain(list(PROMPTS), latents=z, **SIZE, **settings).images


def agree(pipeline: TextToImagePipeline, plain: Any) -> bool:
    """Return whether both draw the same pictures, and those are not of one colour."""
    blank = pipeline.blank(pipeline.encode({"prompt": PROMPTS}))
    assert isinstance(blank, Tensor)
    expected = theirs(plain, tuple(blank.shape[1:]))
    assert float(expected.std()) > 0.02
    return bool(torch.allclose(ours(pipeline), expected, atol=1e-3))


def without_t5(path: Path) -> Path:
    pipe = tiny("sd3")
    pipe.register_modules(**NO_T5)
    pipe.save_pretrained(path)
    return path


@pytest.mark.parametrize("lines", ["null", "left out"])
def test_stable_diffusion_3_without_t5_is_that_of_diffusers(tmp_path: Path, lines: str) -> None:
    folder = without_t5(tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
    if lines == "left out":
        index = {name: part for name, part in index.items() if name not in NO_T5}
        (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = TextToImagePipeline(str(folder), guidance_scale=3.0, **SIZE)
    assert pipeline.diffusers.text_encoder_3 is None
    assert agree(pipeline, plain)
    pipeline.save(tmp_path / "saved")  # as full fine-tuning does
    again = TextToImagePipeline(str(tmp_path / "saved"), guidance_scale=3.0, **SIZE)
    assert torch.equal(ours(again), ours(pipeline))


def test_encodings_are_kept_and_text_encoders_dropped_without_t5(tmp_path: Path) -> None:
    folder = without_t5(tmp_path / "sd3")
    kept: dict[str, Any] = {"embedding_cache": str(tmp_path / "kept"), "text_encoders": "drop"}
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
    for _ in range(2):  # the second one reads what the first one kept
        assert agree(TextToImagePipeline(str(folder), guidance_scale=3.0, **kept, **SIZE), plain)


@pytest.mark.parametrize("lines", ["null", "left out"])
def test_a_model_without_t5_is_planned(tmp_path: Path, lines: str) -> None:
    folder = without_t5(tmp_path / "sd3")
    path = folder / "model_index.json"
    if lines == "left out":
        index = json.loads(path.read_text())
        path.write_text(json.dumps({n: part for n, part in index.items() if n not in NO_T5}))
    with without_weights():
        bare = TextToImagePipeline(str(folder), **SIZE)
    assert bare.diffusers.text_encoder_3 is None


def test_a_single_file_without_t5_is_that_of_diffusers(tmp_path: Path) -> None:
    pipe = of_two_widths("sd3")
    pipe.save_pretrained(tmp_path / "whole")
    held = {name: v for name, v in as_one_file("sd3", pipe).items() if "t5xxl" not in name}
    save_file(held, tmp_path / "x.safetensors")
    pipe.register_modules(**NO_T5)
    pipe.save_pretrained(tmp_path / "less")
    given: dict[str, Any] = {"guidance_scale": 3.0, **SIZE}
    file, less, whole = (str(tmp_path / name) for name in ("x.safetensors", "less", "whole"))
    kind = diffusers.StableDiffusion3Pipeline
    for config, none in ((less, NO_T5), (whole, {})):
        pipeline = TextToImagePipeline(file, config=config, **given)
        assert (pipeline.diffusers.text_encoder_3 is None) == bool(none)
        # T5 is the folder's where the folder has one.
        assert agree(pipeline, kind.from_pretrained(config, **none))
    for weights in (tmp_path / "whole" / "text_encoder_3").glob("*.safetensors"):
        weights.unlink()
    sentence = r"no text_encoder_3 in it, .* or a folder whose model_index.json has text_encoder_3"
    with pytest.raises(UsageError, match=sentence):
        TextToImagePipeline(file, config=whole, **given)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_parts_for_pictures_as_prompts_change_nothing(tmp_path: Path, name: str) -> None:
    """An image encoder and its processor, which folders of IP-Adapter models have."""
    pipe = of_two_widths(name)
    save_file(as_one_file(name, pipe), tmp_path / "x.safetensors")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = CLIPVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sizes)
    seen = {"image_encoder": CLIPVisionModelWithProjection(config)}
    pipe.register_modules(**seen, feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path / "f")
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "f", safety_checker=None)
    given: dict[str, Any] = {"guidance_scale": 3.0, **SIZE}
    assert agree(TextToImagePipeline(str(tmp_path / "f"), **given), plain)
    single = TextToImagePipeline(
        str(tmp_path / "x.safetensors"), config=str(tmp_path / "f"), **given
    )
    assert agree(single, plain)


def test_a_part_that_cannot_be_left_out_is_named(tmp_path: Path) -> None:
    folder = without_t5(tmp_path / "sd3")
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_encoder_2": [None, None]}))
    with pytest.raises(UsageError, match="it has no text_encoder_2; give"):
        TextToImagePipeline(str(folder), **SIZE)
