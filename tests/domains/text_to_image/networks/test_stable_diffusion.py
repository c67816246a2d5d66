"""Folders that the pipeline cannot feed are refused at loading; what it can feed, it feeds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError

Folder = Callable[..., Path]


@pytest.fixture
def changed(tiny_stable_diffusion: Folder, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the tiny folder, with one part of other settings."""

    def make(part: str = "", **settings: Any) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(tiny_stable_diffusion(), copy)
        if part == "index":
            path = copy / "model_index.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        elif part:
            kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
            config = dict(kind.load_config(copy / part))
            network = kind.from_config({**config, **settings})
            shutil.rmtree(copy / part)
            network.save_pretrained(copy / part)
        return copy

    return make


UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "SDXL": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
        r"added conditions, as SDXL's has \(addition_embed_type 'text_time'\)",
    ),
    "images": (
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16},
        r"embeddings of images \(encoder_hid_dim_type 'image_proj'\)",
    ),
    "classes": ({"class_embed_type": "timestep"}, r"on classes \(class_embed_type 'timestep'\)"),
    "labels": ({"num_class_embeds": 7}, r"on classes \(num_class_embeds 7\)"),
    "consistency": ({"time_cond_proj_dim": 8}, r"guidance scale, .*\(time_cond_proj_dim 8\)"),
    "inpainting": ({"in_channels": 9}, "reads 9 channels and its VAE has 4, .* inpainting"),
    "variance": ({"out_channels": 8}, "returns 8 channels of 4"),
    "other text": ({"cross_attention_dim": 24}, "text features of 24 numbers, .* makes 16"),
    "text per block": ({"cross_attention_dim": (16, 24)}, "text features of 24 numbers"),
    "kernel": ({"conv_in_kernel": 2}, r"the denoiser of .* does not fit its other parts"),
    "one kernel": ({"conv_out_kernel": 5, "conv_in_kernel": 4}, "denoiser of .* does not fit"),
}


@pytest.mark.parametrize("kind", UNETS)
def test_unets_that_need_more_are_refused(changed: Callable[..., Path], kind: str) -> None:
    settings, sentence = UNETS[kind]
    with pytest.raises(UsageError, match=sentence) as caught:
        TextToImagePipeline(str(changed("unet", **settings)))
    assert str(caught.value).startswith("pipeline.init_args.pretrained: ")


@pytest.mark.parametrize(
    ("part", "settings", "sentence"),
    [
        ("vae", {"shift_factor": 0.1}, "its VAE has a shift_factor"),
        ("vae", {"latents_mean": [0.1] * 4}, "its VAE has a latents_mean"),
        ("vae", {"out_channels": 1, "in_channels": 1}, "for pictures of 1 channels, not 3"),
        ("vae", {"latent_channels": 8}, "reads 4 channels and its VAE has 8"),
        ("index", {"_class_name": "PixArtSigmaPipeline"}, "PixArtSigmaPipeline, which is not sup"),
        (
            "index",
            {"_class_name": "StableDiffusionControlNetPipeline"},
            "ControlNetPipeline, which",
        ),
        ("index", {"_class_name": "StableDiffusionInpaintPipeline"}, "InpaintPipeline, which"),
        ("index", {"_class_name": ["mine", "Pipeline"]}, r"is a \['mine', 'Pipeline'\], which"),
        ("index", {"text_encoder": [None, None]}, "it has no text_encoder; give"),
        ("index", {"vae": None, "tokenizer": [None, None]}, "it has no vae and no tokenizer"),
    ],
)
def test_other_parts_are_refused(
    changed: Callable[..., Path], part: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        TextToImagePipeline(str(changed(part, **settings)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"vocab_size": 9}, "tokenizer has .* tokens, its text encoder 9"),
        ({"max_position_embeddings": 5}, "model_max_length .* exceeds the 5 positions"),
    ],
)
def test_a_text_encoder_of_another_tokenizer_is_refused(
    changed: Callable[..., Path], settings: dict[str, Any], sentence: str
) -> None:
    folder = changed()
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    own = {**config.to_dict(), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **settings}
    CLIPTextModel(CLIPTextConfig(**own)).save_pretrained(folder / "text_encoder")
    with pytest.raises(UsageError, match=sentence):
        TextToImagePipeline(str(folder))


def test_without_a_size_height_and_width_are_needed(changed: Callable[..., Path]) -> None:
    folder = str(changed("unet", sample_size=None))
    for size in ({}, {"height": 16}):
        with pytest.raises(UsageError, match="has no sample_size; set height and width"):
            TextToImagePipeline(folder, **size)
    assert TextToImagePipeline(folder, height=16, width=24).latent_size == (2, 3)


def test_a_pipeline_of_the_same_parts_is_loaded(changed: Callable[..., Path]) -> None:
    folder = changed("index", _class_name="StableDiffusionImg2ImgPipeline")
    assert TextToImagePipeline(str(folder)).latent_size == (2, 2)


def test_a_tiny_autoencoder_decodes_but_trains_on_no_pictures(
    changed: Callable[..., Path],
) -> None:
    folder = changed("index", vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(folder / "vae")
    channels = (8, 8, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    tiny.save_pretrained(folder / "vae")
    pipeline = TextToImagePipeline(str(folder))
    latents = torch.linspace(-1, 1, 32).reshape(2, 4, 2, 2)
    with torch.no_grad():
        pictures = pipeline.decode(latents, pipeline.example())
        theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
        expected = theirs.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(pictures, expected)
    for call in (pipeline.check_states, lambda: pipeline.states({"image": torch.zeros(1)})):
        with pytest.raises(UsageError, match=r"an AutoencoderTiny, .* give a folder with"):
            call()


def test_the_only_variant_is_found(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed()
    whole = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    whole.to(dtype=torch.float16)
    shutil.rmtree(folder)
    whole.save_pretrained(folder, variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    for pipeline in (
        TextToImagePipeline(str(folder)),
        TextToImagePipeline(str(folder), variant="fp16"),
    ):
        assert {p.dtype for p in pipeline.parameters()} == {torch.float32}
        weight = whole.unet.conv_in.weight.float()
        assert torch.equal(pipeline.denoiser.conv_in.weight, weight)
    with pytest.raises(UsageError, match=r"unet has no weights of the variant bf16"):
        TextToImagePipeline(str(folder), variant="bf16")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (folder / part).glob("*.fp16.safetensors")
        shutil.copy(path, str(path).replace("fp16", "ema"))
    with pytest.raises(UsageError, match=r"variants ema, fp16; set pipeline.init_args.variant"):
        TextToImagePipeline(str(folder))
    assert TextToImagePipeline(str(folder), variant="ema").name == "model"


def test_plain_weights_come_before_variants(changed: Callable[..., Path]) -> None:
    folder = changed()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.with_name("diffusion_pytorch_model.fp16.safetensors").write_text("damaged")
    assert TextToImagePipeline(str(folder)).name == "model"
