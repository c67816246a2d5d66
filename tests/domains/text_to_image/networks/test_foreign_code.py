"""Code that lies beside a model is never run, and nobody is asked whether it may be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer

import domains
from domains.image.pipeline import ImagePipeline
from domains.text_to_image import EMBEDDED
from domains.text_to_image.loading import load_parts
from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.blip_vqa import BlipVQA
from domains.text_to_image.networks.clip import load_clip
from domains.text_to_image.networks.mask2former import Mask2Former
from domains.text_to_image.networks.open_vocabulary import DepthEstimator, OpenVocabulary
from domains.text_to_image.networks.picture_patches import PatchReader
from domains.text_to_image.networks.vision_language import VisionLanguage
from domains.text_to_image.single_file import _configs
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.weightless import without_weights

CODE = 'open("ran", "w").close()\nfrom transformers import PretrainedConfig as X\n'
READERS: dict[str, Callable[[str], Any]] = {
    "blip": lambda source: BlipVQA(source, torch.float32),
    "clip": load_clip,
    "depth": lambda source: DepthEstimator(source, torch.float32),
    "detector": lambda source: OpenVocabulary(source, torch.float32),
    "mask2former": lambda source: Mask2Former(source, torch.float32),
    "patches": PatchReader,
    "vlm": lambda source: VisionLanguage(source, torch.float32),
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a folder in the working directory whose files name classes of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = Path("model")
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    kinds = ("AutoConfig", "AutoImageProcessor", "AutoProcessor", "AutoTokenizer")
    own = {"auto_map": {kind: "own.X" for kind in kinds}}
    for name, told in (
        ("config", {"model_type": "own"}),
        ("tokenizer_config", {"tokenizer_class": "X"}),
        ("preprocessor_config", {"image_processor_type": "X"}),
        ("processor_config", {"processor_class": "X"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps({**told, **own}))
    return str(folder)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_models_of_transformers(reader: str, bare: bool, model: str) -> None:
    with pytest.raises((RuntimeError, UsageError), match="code of its own, which is never run"):
        if bare:
            with without_weights():
                READERS[reader](model)
        else:
            READERS[reader](model)
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", [["model.own", "X"], ["own", "X"], ["transformers", "AutoModel"]])
@pytest.mark.parametrize("bare", [False, True])
def test_parts_of_pipelines(part: list[str], bare: bool, model: str) -> None:
    index = json.loads((EMBEDDED / "shapes" / "model_index.json").read_text()) | {"vae": part}
    (Path(model) / "model_index.json").write_text(json.dumps(index))
    said = f"'model' has as its vae the class {part[1]} of {part[0]}, but code"
    with pytest.raises(UsageError, match=re.escape(f"pretrained: {said}")):
        if bare:
            with without_weights():
                load_parts(model)
        else:
            load_parts(model)
    with pytest.raises(UsageError, match=re.escape(f"config: {said}")):
        _configs(Path("one.safetensors"), {}, "StableDiffusionPipeline", model)
    assert not Path("ran").exists()


def test_an_unknown_kind_of_pipeline_is_refused_as_such(model: str) -> None:
    index = {"_class_name": "IFPipeline", "watermarker": ["deepfloyd_if", "IFWatermarker"]}
    (Path(model) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UsageError, match="is a IFPipeline, which is not supported"):
        load_parts(model)


@pytest.mark.parametrize("name", ["scheduler", "_class_name"])
def test_parts_of_image_models(name: str, model: str) -> None:
    (Path(model) / "config.json").unlink()
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (Path(model) / "model_index.json").write_text(json.dumps({**index, name: ["own", "X"]}))
    with pytest.raises(UsageError, match=f"has as its {name} the class X of own, but code"):
        ImagePipeline(model)
    assert not Path("ran").exists()


def test_readers_are_asked_for_no_code(tmp_path: Path) -> None:
    """A class that transformers chooses may ask for it, unless it is read by `read_auto`."""
    for path in Path(domains.__path__[0]).rglob("*.py"):
        assert not re.search(r"\bAuto[A-Z]\w+\.from_pretrained\(", path.read_text()), path
    source = str(EMBEDDED / "shapes" / "tokenizer")
    assert isinstance(read_auto(CLIPTokenizer, source), CLIPTokenizer)
    assert len(read_auto(AutoTokenizer, source)) > 2
    with pytest.raises((OSError, ValueError), match="config"):
        read_auto(AutoConfig, str(tmp_path))
