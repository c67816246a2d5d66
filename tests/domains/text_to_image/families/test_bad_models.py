"""Models that cannot be loaded: each one sentence with the key, the file and the remedy."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.hub import hub_errors
from lit_rlft.kit.whole_folder import check_whole
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import tiny

KEY = "pipeline.init_args.pretrained"
HUB_ID = "somebody/some-model"


def refused(pretrained: str | Path, **settings: Any) -> str:
    """Return the sentence with which a model is refused."""
    with pytest.raises(UsageError) as caught:
        TextToImagePipeline(str(pretrained), **settings)
    sentence = str(caught.value)
    assert sentence.startswith(f"{KEY}: ") and "\n" not in sentence
    return sentence


def hub_error(kind: type[Exception]) -> Exception:
    """Return one of the hub's errors."""
    if issubclass(kind, errors.HfHubHTTPError):
        response: Any = SimpleNamespace(headers={}, request=None)
        return kind("403 Client Error", response=response)
    return kind("the file is not there")


@pytest.mark.parametrize(
    ("kind", "remedies"),
    [
        (errors.GatedRepoError, ["accept it on the model's page", "`hf auth login`"]),
        (errors.RepositoryNotFoundError, ["check the name", "`hf auth login`"]),
        (errors.RevisionNotFoundError, ["no such revision", "check the name"]),
        (errors.OfflineModeIsEnabled, ["HF_HUB_OFFLINE", f"`hf download {HUB_ID}`"]),
        (errors.LocalEntryNotFoundError, [f"`hf download {HUB_ID}`"]),
        (errors.RemoteEntryNotFoundError, ["lacks a file", "check the name"]),
        (ConnectionError, [f"`hf download {HUB_ID}`"]),
    ],
)
def test_the_hubs_errors_say_what_to_do(
    kind: type[Exception], remedies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **settings: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    sentence = refused(HUB_ID)
    assert repr(HUB_ID) in sentence
    for remedy in remedies:
        assert remedy in sentence


def test_a_model_that_is_not_cached_is_named_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert f"`hf download {HUB_ID}`" in refused(HUB_ID)


def test_errors_of_folders_are_not_the_hubs(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), hub_errors(str(tmp_path), KEY):
        raise ConnectionError("no")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder whose U-Net's weights are in pieces."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    parts = tiny("sd")
    parts.save_pretrained(folder)
    shutil.rmtree(folder / "unet")
    parts.unet.save_pretrained(folder / "unet", max_shard_size="40kB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_whole_folder_in_pieces_is_loaded(whole: Path) -> None:
    TextToImagePipeline(str(whole))


PIECE = "unet/diffusion_pytorch_model-00002-of-"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (PIECE, "remove", "is missing"),
        (PIECE, "cut", "of .* bytes, so its download was cut off"),
        (VAE, "cut", "of .* bytes, so its download was cut off"),
        (VAE, "cut early", "of more bytes, so its download was cut off"),
        (VAE, "empty", "is empty"),
        (VAE, "point", "is a pointer of Git LFS.*`git lfs pull`"),
        (VAE, "remove", "has no weights"),
        ("unet/config.json", "remove", "there is no"),
        ("unet/config.json", "cut", "is no JSON file"),
        ("text_encoder/model.safetensors", "point", "is a pointer of Git LFS"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "cut", "is no JSON file"),
    ],
)
def test_folders_that_are_not_whole(folder: Path, name: str, change: str, problem: str) -> None:
    (path,) = (folder / name).parent.glob(f"{Path(name).name}*")
    content = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        kept = {
            "cut": content[: len(content) * 2 // 3],
            "cut early": content[:100],
            "empty": b"",
            "point": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        }
        path.write_bytes(kept[change])
    with pytest.raises(UsageError, match=problem) as caught:
        check_whole(folder, ["unet", "text_encoder", "vae"], None, KEY)
    sentence = str(caught.value)
    assert str(path.parent if problem == "has no weights" else path) in sentence
    assert re.search("download (it|the model) again", sentence) and "\n" not in sentence


def test_a_folder_that_is_not_whole_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / VAE
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} has" in refused(folder)
    shutil.rmtree(folder / "vae")
    assert f"there is no {folder / 'vae' / 'config.json'}" in refused(folder)


def test_files_of_another_variant_are_not_looked_at(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    check_whole(folder, ["unet", "text_encoder", "vae"], None, KEY)
    with pytest.raises(UsageError, match=r"fp16\.safetensors is empty"):
        check_whole(folder, ["vae"], "fp16", KEY)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "all"])
def test_pickles_in_folders_are_refused_with_their_conversion(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = tmp_path / "f", tiny("sd")
    plain.save_pretrained(folder)
    if part == "all":
        shutil.rmtree(folder)
        plain.save_pretrained(folder, safe_serialization=False)
    else:
        (file,) = (folder / part).glob("*.safetensors")
        file.unlink()
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(plain.components[part].state_dict(), folder / part / name)
    own = {"embedding_cache": str(tmp_path / "c"), "text_encoders": "drop"}
    for settings in ({}, own):
        with pytest.raises(
            UsageError, match=r"pretrained: .*\.bin is a pickle, .* convert"
        ) as said:
            TextToImagePipeline(str(folder), height=32, width=32, **settings)
    line = str(said.value).partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(line, {})  # it is diffusers' own conversion
    again = TextToImagePipeline(str(tmp_path / "f-safetensors"), height=32, width=32)
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(again.denoiser.state_dict()[name], value)


def test_pickles_of_other_parts_are_refused(tmp_path: Path) -> None:
    plain = tiny("sd")
    plain.save_pretrained(tmp_path / "f")
    plain.vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    plain.vae.save_pretrained(tmp_path / "whole" / "vae", safe_serialization=False)
    for vae, place in (("vae", "vae"), ("whole", "whole/vae")):
        sentence = rf"init_args.vae: {tmp_path / place}/\S+\.bin is a pickle, .*AutoencoderKL as p"
        with pytest.raises(UsageError, match=sentence):
            TextToImagePipeline(str(tmp_path / "f"), vae=str(tmp_path / vae), height=32, width=32)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = CLIPVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sizes)
    seen = CLIPVisionModelWithProjection(config)
    plain.register_modules(image_encoder=seen, feature_extractor=CLIPImageProcessor())
    plain.save_pretrained(tmp_path / "g")
    (tmp_path / "g/image_encoder/model.safetensors").unlink()
    torch.save(seen.state_dict(), tmp_path / "g/image_encoder/pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pretrained: .*g' has no safetensors files of a part"):
        TextToImagePipeline(str(tmp_path / "g"), height=32, width=32)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"_class_name": "PixArtSigmaPipeline"}, "known are StableDiffusionPipeline, Stab"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "no text_encoder_2"),
        ({"unet": None}, "no unet"),
        ({"text_encoder": [None, None]}, "no text_encoder"),
    ],
)
def test_other_kinds_and_absent_parts_are_named(
    folder: Path, index: dict[str, Any], said: str
) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    sentence = refused(folder)
    assert said in sentence and repr(str(folder)) in sentence


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tiny models and a LoRA of each."""
    models = tmp_path_factory.mktemp("loras")
    for name in ("sd", "sdxl", "sd3", "flux_dev", "zimage"):
        tiny(name).save_pretrained(models / name)
        pipeline = TextToImagePipeline(str(models / name), height=32, width=32)
        adapt(pipeline, LoRA(rank=2, alpha=2), seed=0)
        pipeline.save(models / f"{name}_lora")
    return models


@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        ("sd", "sdxl", r"is for another model: this UNet2DConditionModel has no layer .*'sdxl'"),
        ("sdxl", "sd", r"is for another model: this UNet2DConditionModel has no layer .*'sd'"),
        ("sd3", "flux_dev", "is for another model: this FluxTransformer2DModel has no layer"),
        ("flux_dev", "sd3", "is for another model: this SD3Transformer2DModel has no layer"),
        ("sd3", "sdxl", "of a transformer"),
        ("sdxl", "flux_dev", "of a U-Net"),
        ("sd3", "zimage", "ZImageTransformer2DModel has no layer"),
        ("zimage", "sd3", "SD3Transformer2DModel has no layer"),
    ],
)
def test_a_lora_of_another_family_is_named(given: str, model: str, said: str, loras: Path) -> None:
    pipeline = TextToImagePipeline(str(loras / model), height=32, width=32)
    lora = LoRA(rank=2, alpha=2, pretrained=str(loras / f"{given}_lora"))
    layers = [(name, type(layer)) for name, layer in pipeline.denoiser.named_modules()]
    with pytest.raises(UsageError, match=rf"^model\.init_args\.lora\.pretrained: .*{said}"):
        adapt(pipeline, lora, seed=0)
    # As it was, for another try.
    assert [(name, type(layer)) for name, layer in pipeline.denoiser.named_modules()] == layers
    assert all(weight.requires_grad for weight in pipeline.denoiser.parameters())
