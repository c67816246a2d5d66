"""LoRAs in files: what is written diffusers reads whole; what other tools wrote is read."""

import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.reference import LoRA, attach_lora, completed
from tests.support import ROOT

Folder = Callable[..., Path]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TARGETS: dict[str, list[str] | None] = {
    "attention": None,
    "attention and projections": [*ATTENTION, "proj_in", "proj_out"],
    "projections alone": ["proj_in", "proj_out"],
    "feed-forward": ["ff.net.0.proj", "ff.net.2"],
    "attention and feed-forward": [*ATTENTION, "ff.net.0.proj", "ff.net.2"],
    "residual convolutions": ["conv1", "conv2", "conv_shortcut"],
    "attention and convolutions": [*ATTENTION, "conv1", "conv2", "conv_shortcut"],
    "first and last": ["conv_in", "conv_out"],
    "sampling": ["downsamplers.0.conv", "upsamplers.0.conv"],
    "times": ["time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"],
    "attention and times": [*ATTENTION, "time_emb_proj", "linear_1", "linear_2"],
    "outputs alone": ["to_out.0"],
    "one layer": [f"{BLOCK}.attn1.to_q"],
    "one layer and one output": ["conv_in", f"{BLOCK}.attn2.to_out.0"],
    "a pattern": ["attn2.to_k", "attn2.to_v"],
    "nearly all": [
        *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        *("conv_shortcut", "conv_in", "conv_out", "conv", "time_emb_proj", "linear_1", "linear_2"),
    ],
}
INPUTS = (torch.linspace(-2, 2, 16).reshape(1, 4, 2, 2), torch.tensor([500]))
TEXT = torch.linspace(-1, 1, 5 * 16).reshape(1, 5, 16)


@pytest.fixture(scope="module")
def base(tiny_stable_diffusion: Folder) -> TextToImagePipeline:
    return TextToImagePipeline(str(tiny_stable_diffusion()))


@pytest.fixture(scope="module")
def plain(tiny_stable_diffusion: Folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion(), safety_checker=None)


@pytest.fixture(scope="module")
def fresh(
    base: TextToImagePipeline, plain: StableDiffusionPipeline
) -> Callable[[], TextToImagePipeline]:
    """Return a function that returns the pipeline with a new copy of its U-Net."""
    weights = {name: value.clone() for name, value in plain.unet.state_dict().items()}

    def make() -> TextToImagePipeline:
        unet = UNet2DConditionModel.from_config(plain.unet.config)
        unet.load_state_dict(weights)
        base.denoiser = base.diffusers.unet = unet.eval()
        return base

    return make


def randomised(network: nn.Module) -> None:
    """Give a LoRA an update that is not zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def adapted(network: nn.Module) -> set[str]:
    return {name for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}


@torch.no_grad()
def predicted(network: Any) -> Tensor:
    """Predict in double precision, in which equal weights agree on every processor."""
    sample, time = INPUTS
    return copy.deepcopy(network).double()(sample.double(), time, TEXT.double()).sample


def tuned_unet(
    make: Callable[[], TextToImagePipeline], targets: list[str] | None = None
) -> nn.Module:
    """Return a U-Net with a LoRA of rank 2 and alpha 6, for other tools to write."""
    pipeline = make()
    attach_lora(pipeline, LoRA(rank=2, alpha=6, targets=targets))
    randomised(pipeline.denoiser)
    return pipeline.denoiser


@pytest.mark.parametrize("kind", TARGETS)
def test_diffusers_has_every_layer_that_was_trained(
    fresh: Callable[[], TextToImagePipeline],
    plain: StableDiffusionPipeline,
    tmp_path: Path,
    kind: str,
) -> None:
    pipeline = fresh()
    before = predicted(pipeline.denoiser)
    attach_lora(pipeline, LoRA(rank=2, alpha=6, targets=TARGETS[kind]))
    randomised(pipeline.denoiser)
    layers, expected = adapted(pipeline.denoiser), predicted(pipeline.denoiser)
    assert layers and (expected - before).abs().max() > 1e-3
    pipeline.save(tmp_path)
    plain.load_lora_weights(tmp_path)
    try:
        assert adapted(plain.unet) == layers
        torch.testing.assert_close(predicted(plain.unet), expected)
    finally:
        plain.unload_lora_weights()
    saved = {name: value.clone() for name, value in pipeline.denoiser.state_dict().items()}
    again = fresh()
    attach_lora(again, LoRA(2, 6, targets=TARGETS[kind], pretrained=str(tmp_path)))
    read = again.denoiser.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(read[name], value) for name, value in saved.items())


def test_every_target_fits_a_layer_that_takes_a_lora(
    fresh: Callable[[], TextToImagePipeline],
) -> None:
    for targets, sentence in (
        (["to_q", "to_kk"], r"no layer .* is named 'to_kk'; set model.init_args.lora.targets"),
        (["to_q", "norm1"], r"lora.targets: 'norm1' is the \w+Norm .*, which takes no LoRA"),
        (["attn1"], r"'attn1' is the Attention .*, which takes no LoRA"),
    ):
        pipeline = fresh()
        with pytest.raises(UsageError, match=sentence):
            attach_lora(pipeline, LoRA(targets=targets))
        assert not adapted(pipeline.denoiser)
        assert all(p.requires_grad for p in pipeline.denoiser.parameters())


def _diffusers(unet: nn.Module, folder: Path) -> None:
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "my_style.safetensors")


def _kohya(unet: nn.Module, folder: Path) -> None:
    """Names as sd-scripts make them: the path with underscores, then down, up and alpha."""
    weights: dict[str, Tensor] = {}
    for name, value in get_peft_model_state_dict(unet).items():
        layer, _, half = name.partition(".lora_")
        own = "lora_unet_" + layer.replace(".", "_")
        weights[f"{own}.lora_{'down' if half == 'A.weight' else 'up'}.weight"] = value.clone()
        weights[f"{own}.alpha"] = torch.tensor(6.0)
    save_file(weights, folder / "k.safetensors")


def _peft(unet: Any, folder: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=ATTENTION)
    own = {n: v.clone() for n, v in get_peft_model_state_dict(unet).items()}
    clean = UNet2DConditionModel.from_config(unet.config)
    model = get_peft_model(clean, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").replace(".default.", ".")
            parameter.data = own[key]
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "alpha", "kind"),
    [
        (_diffusers, 2, "attention"),
        (_diffusers, 2, "nearly all"),
        (_kohya, 6, "attention"),
        (_kohya, 6, "nearly all"),
        (_peft, 6, "attention"),
    ],
)
def test_files_of_other_tools_are_read(
    fresh: Callable[[], TextToImagePipeline],
    plain: StableDiffusionPipeline,
    tmp_path: Path,
    write: Callable[[Any, Path], None],
    alpha: int,
    kind: str,
) -> None:
    """A file without an alpha has the rank's, as diffusers takes it."""
    unet = tuned_unet(fresh, TARGETS[kind])
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scaling["default"] = alpha / 2  # type: ignore[attr-defined]
    expected = predicted(unet)
    write(unet, tmp_path)
    again = fresh()
    attach_lora(again, LoRA(2, alpha, targets=TARGETS[kind], pretrained=str(tmp_path)))
    torch.testing.assert_close(predicted(again.denoiser), expected)
    if write is not _peft:
        plain.load_lora_weights(tmp_path)
        theirs = predicted(plain.unet)
        plain.unload_lora_weights()
        torch.testing.assert_close(theirs, expected)


def _names(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[..., None]:
    def write(unet: nn.Module, folder: Path) -> None:
        weights = {f"unet.{n}": v.clone() for n, v in get_peft_model_state_dict(unet).items()}
        save_file(dict(change(weights)), folder / "pytorch_lora_weights.safetensors")

    return write


def _first(weights: dict[str, Tensor]) -> str:
    return next(iter(weights)).partition(".lora_")[0]


def _settings(**config: Any) -> Callable[..., None]:
    def write(unet: nn.Module, folder: Path) -> None:
        weights = {f"unet.{n}": v.clone() for n, v in get_peft_model_state_dict(unet).items()}
        metadata = json.dumps({f"unet.{name}": value for name, value in config.items()})
        path = folder / "pytorch_lora_weights.safetensors"
        save_file(weights, path, {"lora_adapter_metadata": metadata})

    return write


def _kohya_with(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., None]:
    def write(unet: nn.Module, folder: Path) -> None:
        _kohya(unet, folder)
        weights = load_file(folder / "k.safetensors")
        change(weights)
        save_file(weights, folder / "k.safetensors")

    return write


def _wider(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for end, dim in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
        name = _first(weights) + end
        weights[name] = torch.cat([weights[name]] * 2, dim)
    return weights


def _several(unet: nn.Module, folder: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")


def _pickled(unet: nn.Module, folder: Path) -> None:
    torch.save(get_peft_model_state_dict(unet), folder / "pytorch_lora_weights.bin")


def _without_config(unet: nn.Module, folder: Path) -> None:
    _peft(unet, folder)
    (folder / "adapter_config.json").unlink()


ODD = (torch.zeros(2, 2),)
REFUSED: dict[str, tuple[Callable[..., None], str]] = {
    "several": (_several, r"has several files, a.safetensors, b.safetensors; give one"),
    "pickle": (_pickled, r"\.bin is a pickle, which can run code; convert it: python -c"),
    "ranks": (_names(_wider), "has layers of the ranks 2, 4"),
    "DoRA": (
        _names(lambda w: {**w, f"{_first(w)}.lora_magnitude_vector.weight": torch.zeros(8)}),
        "has DoRA, which is not supported; fuse it with diffusers",
    ),
    "LoKr": (_names(lambda w: {"lora_unet_x.lokr_w1": ODD[0]}), "has LoKr"),
    "LoHa": (_names(lambda w: {"lora_unet_x.hada_w1_a": ODD[0]}), "has LoHa"),
    "alphas in names": (
        _names(lambda w: {**w, f"{_first(w)}.alpha": torch.tensor(1.0)}),
        "has alphas of single layers, which is not supported",
    ),
    "alpha": (_settings(lora_alpha="high"), "has alpha 'high', which is no number"),
    "transformer": (
        _names(lambda w: {n.replace("unet.", "transformer."): v for n, v in w.items()}),
        "is a LoRA of a transformer, as SD 3 and FLUX have",
    ),
    "checkpoint": (_names(lambda w: {"model.diffusion_model.out": ODD[0]}), "is no LoRA"),
    "layers of another model": (
        _names(lambda w: {n.replace("attn1", "attn7"): v for n, v in w.items()}),
        r"is for another model: this UNet2DConditionModel has no layer .*attn7",
    ),
    "rank pattern": (_settings(rank_pattern={"to_q": 4}), "trained with rank_pattern"),
    "alpha pattern": (_settings(alpha_pattern={"to_q": 4}), "trained with alpha_pattern"),
    "changed start": (_settings(init_lora_weights="pissa"), "with init_lora_weights pissa"),
    "half alpha": (_settings(lora_alpha=0.5), "has alpha 0.5, which is no whole number"),
    "kohya's alphas": (
        _kohya_with(lambda w: w.update({next(iter(sorted(w))): torch.tensor(3.0)})),
        "has several alphas, 3, 6; fuse it",
    ),
    "kohya's DoRA": (
        _kohya_with(lambda w: w.update({"lora_unet_x.dora_scale": ODD[0]})),
        "has DoRA",
    ),
    "peft without config": (_without_config, "of peft, whose alpha is in adapter_config.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_a_lora_is_refused(
    fresh: Callable[[], TextToImagePipeline], tmp_path: Path, kind: str
) -> None:
    write, sentence = REFUSED[kind]
    write(tuned_unet(fresh), tmp_path)
    with pytest.raises(UsageError, match=sentence) as caught:
        attach_lora(fresh(), LoRA(2, 6, pretrained=str(tmp_path)))
    assert str(caught.value).startswith("model.init_args.lora.pretrained")
    assert len(str(caught.value).replace(str(tmp_path), "runs/a")) < 300


def test_given_targets_have_to_agree_with_the_file(
    fresh: Callable[[], TextToImagePipeline], tmp_path: Path
) -> None:
    _names(lambda w: {n: v for n, v in w.items() if ".to_q." in n})(tuned_unet(fresh), tmp_path)
    sentence = r"adapts other layers than targets, such as .*; set .*lora.targets to \['to_q'\]"
    with pytest.raises(UsageError, match=sentence):
        attach_lora(fresh(), LoRA(2, 2, ["to_q", "to_k"], pretrained=str(tmp_path)))


@pytest.mark.parametrize("kind", ["attention", "feed-forward", "one layer"])
def test_what_is_not_given_is_the_files(
    fresh: Callable[[], TextToImagePipeline], tmp_path: Path, kind: str
) -> None:
    pipeline = fresh()
    attach_lora(pipeline, LoRA(rank=2, alpha=6, targets=TARGETS[kind]))
    randomised(pipeline.denoiser)
    layers, expected = adapted(pipeline.denoiser), predicted(pipeline.denoiser)
    pipeline.save(tmp_path)
    again = fresh()
    given = completed(LoRA(pretrained=str(tmp_path)), again)
    assert (given.rank, given.alpha) == (2, 6)
    attach_lora(again, LoRA(pretrained=str(tmp_path)))
    assert adapted(again.denoiser) == layers
    torch.testing.assert_close(predicted(again.denoiser), expected)
    for wrong, setting in ({"rank": 4}, "rank"), ({"alpha": 2}, "alpha"):
        with pytest.raises(UsageError, match=rf"set model.init_args.lora.{setting} to the file's"):
            attach_lora(fresh(), LoRA(pretrained=str(tmp_path), **wrong))  # type: ignore[arg-type]
    assert (LoRA().rank, LoRA().alpha) == (8, 8)
    for path in sorted((ROOT / "configs/algorithms").glob("*.yaml")):  # they ask for no other
        own = yaml.safe_load(path.read_text())["model"]["init_args"].get("lora")
        if own is not None:
            assert completed(LoRA(**own, pretrained=str(tmp_path)), fresh()) == given


@pytest.mark.parametrize("write", [_diffusers, _kohya])
def test_a_lora_of_text_encoders_is_said_and_left_out(
    fresh: Callable[[], TextToImagePipeline],
    tmp_path: Path,
    write: Callable[[Any, Path], None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    unet = tuned_unet(fresh)
    write(unet, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    layer = "encoder.layers.0.self_attn.k_proj"
    if write is _kohya:
        own = f"lora_te_text_model_{layer.replace('.', '_')}"
        text = {f"{own}.lora_down.weight": torch.zeros(2, 16), f"{own}.alpha": torch.tensor(6.0)}
        text[f"{own}.lora_up.weight"] = torch.zeros(16, 2)
    else:
        text = {f"text_encoder.text_model.{layer}.lora_A.weight": torch.zeros(2, 16)}
    save_file({**load_file(path), **text}, path)
    again = fresh()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        attach_lora(again, LoRA(pretrained=str(path)))
    assert (
        "its LoRA of text encoders (1 layers) is left out" in caplog.text + capsys.readouterr().err
    )
    expected = get_peft_model_state_dict(unet)
    read = get_peft_model_state_dict(again.denoiser)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) for name, value in expected.items())


def _command(sentence: str, folder: Path) -> None:
    """Run what a sentence says to type."""
    _, python, code = shlex.split(sentence[sentence.index("python -c") :])[0:3]
    assert python == "-c"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_the_command_that_converts_a_pickle_works(
    fresh: Callable[[], TextToImagePipeline], tmp_path: Path
) -> None:
    unet = tuned_unet(fresh)
    weights = {f"unet.{n}": v.clone() for n, v in get_peft_model_state_dict(unet).items()}
    torch.save(weights, path := tmp_path / "lora.bin")
    with pytest.raises(UsageError, match="python -c") as caught:
        attach_lora(fresh(), LoRA(2, 2, pretrained=str(path)))
    assert len(str(caught.value).replace(str(path), "runs/style/lora.safetensors")) < 300
    _command(str(caught.value), tmp_path)
    again = fresh()
    attach_lora(again, LoRA(2, 2, pretrained=str(tmp_path / "lora.safetensors")))
    read = get_peft_model_state_dict(again.denoiser)
    assert all(torch.equal(read[n.removeprefix("unet.")], v) for n, v in weights.items())


def test_damaged_files_are_named(fresh: Callable[[], TextToImagePipeline], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    _diffusers(tuned_unet(fresh), tmp_path / "whole")
    whole = (tmp_path / "whole" / "my_style.safetensors").read_bytes()
    for content, sentence in (
        (whole[:-50], r"has \d+ of (more|\d+) bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"<html>", "is a web page"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"lora.pretrained: .*{sentence}"):
            attach_lora(fresh(), LoRA(pretrained=str(path)))


def test_a_pickle_is_never_run(fresh: Callable[[], TextToImagePipeline], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Bomb(), tmp_path / "x.bin")
    for path in (tmp_path, tmp_path / "x.bin"):
        with pytest.raises(UsageError, match="is a pickle"):
            attach_lora(fresh(), LoRA(pretrained=str(path)))
    assert not (tmp_path / "ran").exists()
