"""LoRAs for and from other programs: diffusers' own readers find the same layers and pictures."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from domains.text_to_image.networks.lora import Home, lora_weights
from domains.text_to_image.networks.web_lora import WEB_LORA, save_web_lora
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.reference import LoRA, adapt, completed
from tests.domains.text_to_image.families.original import sgm_names
from tests.domains.text_to_image.families.test_tuning import SIZE, latents
from tests.domains.text_to_image.families.tiny import tiny

SLOW = pytest.mark.slow
FAMILIES = [
    "sdxl",
    *(
        pytest.param(name, marks=SLOW)
        for name in ("sd", "sd3", "flux_dev", "klein", "zimage", "sana")
    ),
]
DOUBLE = [
    f"transformer_blocks.0.attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model of a family."""
    path = tmp_path_factory.mktemp("family") / request.param
    tiny(request.param).save_pretrained(path)
    return path


def perturbed(
    folder: Path, targets: list[str] | None = None, **settings: Any
) -> TextToImagePipeline:
    """Return a pipeline whose LoRA, of rank 2 and alpha 3, changes something."""
    pipeline = TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE, **settings)
    adapt(pipeline, LoRA(rank=2, alpha=3, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def adapted(network: torch.nn.Module) -> set[str]:
    return {name for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}


def read_by_both(folder: Path, path: Path, layers: set[str], expected: Tensor) -> LoRA:
    """Check that diffusers and we find the same LoRA in a file; return what we found."""
    theirs = TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE)
    assert (latents(theirs) - expected).abs().max() > 0.01
    theirs.diffusers.load_lora_weights(path.parent, weight_name=path.name)
    assert adapted(theirs.denoiser) == layers
    torch.testing.assert_close(latents(theirs), expected, atol=1e-5, rtol=1e-4)
    return read_by_us(folder, path, layers, expected)


def read_by_us(folder: Path, path: Path, layers: set[str], expected: Tensor) -> LoRA:
    ours = TextToImagePipeline(str(folder), guidance_scale=2.0, **SIZE)
    lora = completed(LoRA(pretrained=str(path)), ours)
    adapt(ours, lora, seed=5)
    assert adapted(ours.denoiser) == layers
    torch.testing.assert_close(latents(ours), expected, atol=1e-5, rtol=1e-4)
    return lora


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_lora_for_web_interfaces(folder: Path, tmp_path: Path) -> None:
    tuned = perturbed(folder, web_lora=True)
    assert [path.name for path in tuned.save(tmp_path)][-1] == WEB_LORA
    layers, expected = adapted(tuned.denoiser), latents(tuned)
    lora = read_by_both(folder, tmp_path / WEB_LORA, layers, expected)
    unet = folder.name.startswith("sd") and folder.name != "sd3"
    assert (lora.rank, lora.alpha) == ((2, 3) if unet else (2, 2))
    with safe_open(tmp_path / WEB_LORA, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    by_kohya = unet or folder.name == "klein"
    assert all(name.startswith("lora_unet_" if by_kohya else "transformer.") for name in names)
    joined = 2 * 2 if folder.name == "klein" else 0  # of three layers for q, k, v, twice a block
    assert len(names) == (3 if unet else 2) * (len(layers) - joined)
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == f"{lora.alpha}"
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert str(folder.parent) not in str(metadata)
    plain: DiffusionPipeline = tiny(folder.name)
    plain.load_lora_weights(tmp_path)  # the folder's first file is still diffusers' own
    assert adapted(getattr(plain, tuned.family.denoiser_name)) == layers
    # There and back again: the file written from what was read has the same tensors.
    again = TextToImagePipeline(str(folder), web_lora=True, **SIZE)
    adapt(again, LoRA(pretrained=str(tmp_path / WEB_LORA)), seed=3)
    again.save(tmp_path / "again")
    first, second = load_file(tmp_path / WEB_LORA), load_file(tmp_path / "again" / WEB_LORA)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("folder", ["sd", "sdxl"], indirect=True)
def test_layers_that_diffusers_finds_again_in_a_web_lora_and_those_that_it_does_not(
    folder: Path, tmp_path: Path
) -> None:
    plain: Any = tiny(folder.name)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {name for name, layer in plain.unet.named_modules() if isinstance(layer, kinds)}
    lost = {name for name in layers if name.startswith("add_embedding.")}
    assert len(lost) == (2 if folder.name == "sdxl" else 0)
    good = perturbed(folder, sorted(layers - lost), web_lora=True)
    good.settle(torch.device("cpu"), torch.float32)
    good.save(tmp_path)
    read_by_both(folder, tmp_path / WEB_LORA, layers - lost, latents(good))
    for layer in lost:
        bad = perturbed(folder, ["conv_in", layer], web_lora=True)
        with pytest.raises(UsageError, match=rf"web_lora: .* the layers {layer} in web_lora\.saf"):
            bad.settle(torch.device("cpu"), torch.float32)
        bad.save(tmp_path / layer)
        plain = tiny(folder.name)
        with suppress(Exception):  # whichever way it fails
            plain.load_lora_weights(tmp_path / layer, weight_name=WEB_LORA)
        assert layer not in adapted(plain.unet)
        bad.web_lora = False
        bad.settle(torch.device("cpu"), torch.float32)


STABILITY = "https://github.com/Stability-AI/generative-models"
BLACK_FOREST = "https://github.com/black-forest-labs/flux"
NAMES: list[tuple[str, dict[str, Any], bool, tuple[str, str, str], int]] = [
    ("StableDiffusion", {}, False, ("sd_v1", "stable-diffusion-v1", "diffusers"), 1),
    (
        "StableDiffusion",
        {"cross_attention_dim": 1024},
        False,
        ("sd_v2", "stable-diffusion-v2-512", "diffusers"),
        2,
    ),
    (
        "StableDiffusion",
        {"cross_attention_dim": 1024},
        True,
        ("sd_v2_v", "stable-diffusion-v2-768-v", "diffusers"),
        2,
    ),
    (
        "StableDiffusionXL",
        {},
        False,
        ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", STABILITY),
        3,
    ),
    ("Flux", {"guidance_embeds": True}, False, ("flux1", "flux-1-dev", BLACK_FOREST), 1),
    ("Flux", {"guidance_embeds": False}, False, ("flux1", "flux-1-schnell", BLACK_FOREST), 1),
    (
        "Flux2Klein",
        {"joint_attention_dim": 7680},
        False,
        ("flux_2_klein_4b", "Flux.2-klein-4b", f"{BLACK_FOREST}2"),
        1,
    ),
    (
        "Flux2Klein",
        {"joint_attention_dim": 12288},
        False,
        ("flux_2_klein_9b", "Flux.2-klein-9b", f"{BLACK_FOREST}2"),
        1,
    ),
]


@pytest.mark.parametrize(("kind", "config", "v", "names", "shown_for"), NAMES, ids=str)
def test_the_base_model_has_kohyas_names(
    kind: str,
    config: dict[str, Any],
    v: bool,
    names: tuple[str, str, str],
    shown_for: int,
    tmp_path: Path,
) -> None:
    unet = kind.startswith("Stable")
    home = Home(getattr(diffusers, f"{kind}Pipeline"), "unet" if unet else "transformer", config)
    layer = "mid_block.attentions.0.proj_in" if unet else "transformer_blocks.0.attn.to_q"
    weights = {f"{layer}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    path = save_web_lora(weights, 2, 2, home, tmp_path / WEB_LORA, "a title", v)
    with safe_open(path, "pt") as file:
        found = file.metadata()
    version, architecture, implementation = names
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == f"{architecture}/lora"
    assert found["modelspec.implementation"] == implementation
    assert found.get("modelspec.prediction_type") == (("v" if v else "epsilon") if unet else None)
    # How AUTOMATIC1111 tells the kinds of Stable Diffusion apart, for 1, 2 and XL.
    other = 2 if str(found.get("ss_v2", "")) == "True" else 1
    assert shown_for == (3 if found["ss_base_model_version"].startswith("sdxl_") else other)


@pytest.mark.parametrize("folder", ["sdxl"], indirect=True)
def test_kohyas_names_of_the_original_unet_are_read(folder: Path, tmp_path: Path) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"]
    tuned = perturbed(folder, targets)
    layers, names = adapted(tuned.denoiser), sgm_names(tiny("sdxl").unet)
    weights: dict[str, Tensor] = {}
    for name, value in lora_weights(tuned.denoiser).items():
        layer, _, half = name.partition(".lora_")
        own = "lora_unet_" + names[f"{layer}.weight"].removesuffix(".weight").replace(".", "_")
        weights[f"{own}.lora_{'down' if half == 'A.weight' else 'up'}.weight"] = value.clone()
        weights[f"{own}.alpha"] = torch.tensor(3.0)
    assert any("input_blocks" in name for name in weights)
    save_file(weights, tmp_path / "k.safetensors")
    lora = read_by_both(folder, tmp_path / "k.safetensors", layers, latents(tuned))
    assert (lora.rank, lora.alpha) == (2, 3)


def _joined(weights: dict[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a LoRA of FLUX's first double block by its original layers: down and up."""
    start, found = "transformer_blocks.0.attn.", {}
    for own, out, three in (
        ("img_attn", "to_out.0", ("to_q", "to_k", "to_v")),
        ("txt_attn", None, ("add_q_proj", "add_k_proj", "add_v_proj")),
    ):
        down = weights[f"{start}{three[0]}.lora_A.weight"]
        ups = [weights[f"{start}{name}.lora_B.weight"] for name in three]
        found[f"double_blocks.0.{own}.qkv"] = (down, torch.cat(ups) * scale)
        if out:
            found[f"double_blocks.0.{own}.proj"] = (
                weights[f"{start}{out}.lora_A.weight"],
                weights[f"{start}{out}.lora_B.weight"] * scale,
            )
    return found


def _kohya_flux(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (down, up) in _joined(weights, 1.0).items():
        own = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up}
        found[f"{own}.alpha"] = torch.tensor(3.0)
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    found[f"{text}.lora_up.weight"] = torch.zeros(37, 2)
    return found | {f"{text}.lora_down.weight": torch.zeros(2, 32)}


def _split_kohya_flux(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return queries, keys and values of ranks of their own: a down of 3 r, block-diagonal ups."""
    found = _kohya_flux(weights)
    for own, three in (
        ("img_attn", ("to_q", "to_k", "to_v")),
        ("txt_attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ):
        name = f"lora_unet_double_blocks_0_{own}_qkv"
        start = "transformer_blocks.0.attn."
        ups = [weights[f"{start}{part}.lora_B.weight"] for part in three]
        downs = [weights[f"{start}{part}.lora_A.weight"] for part in three]
        found[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
        found[f"{name}.lora_down.weight"] = torch.cat(downs)
        found[f"{name}.alpha"] = torch.tensor(9.0)  # of 6 rows: the same scale
    return found


def _comfy_flux(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    halves = _joined(weights, 1.5).items()
    down = {f"diffusion_model.{name}.lora_A.weight": half[0] for name, half in halves}
    return down | {f"diffusion_model.{name}.lora_B.weight": half[1] for name, half in halves}


def _prefixed(prefix: str, alpha: bool) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def write(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = 1.0 if alpha else 1.5
        found = {
            f"{prefix}{name}": value * scale if "lora_B" in name else value
            for name, value in weights.items()
        }
        layers = {name.partition(".lora_")[0] for name in found} if alpha else set()
        return found | {f"{layer}.alpha": torch.tensor(3.0) for layer in layers}

    return write


FLUX: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], bool, int]] = {
    "kohya": (_kohya_flux, True, 2),
    "kohya, split": (_split_kohya_flux, True, 2),
    "original names": (_comfy_flux, False, 2),
    "ai-toolkit": (_prefixed("transformer.", alpha=False), True, 2),
    "ai-toolkit with alphas": (_prefixed("transformer.", alpha=True), True, 3),
    "diffusion_model": (_prefixed("diffusion_model.", alpha=False), False, 2),
}
"""How to write it, whether diffusers reads it as it is, and the alpha that is found."""
FAST = ("kohya, split", "original names")


@pytest.mark.parametrize(
    ("folder", "kind"),
    [pytest.param("flux_dev", kind, marks=() if kind in FAST else SLOW) for kind in FLUX]
    + [pytest.param("klein", kind, marks=SLOW) for kind in FLUX],
    indirect=["folder"],
)
def test_files_of_flux_of_other_tools_are_read(folder: Path, tmp_path: Path, kind: str) -> None:
    write, readable, alpha = FLUX[kind]
    readable &= (folder.name, kind) != ("klein", "ai-toolkit with alphas")
    tuned = perturbed(folder, DOUBLE)
    if "kohya" in kind or kind == "original names":  # one down for queries, keys and values
        for start in ("", "add_") if kind != "kohya, split" else ():
            own = [f"{start}{x}_proj" if start else f"to_{x}" for x in "qkv"]
            attention = tuned.denoiser.transformer_blocks[0].attn
            downs = [getattr(attention, name).lora_A["default"].weight for name in own]
            for down in downs[1:]:
                down.data = downs[0].data.clone()
    weights = {name: value.clone() for name, value in lora_weights(tuned.denoiser).items()}
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous().clone() for name, value in write(weights).items()}, path)
    check = read_by_both if readable else read_by_us
    lora = check(folder, path, adapted(tuned.denoiser), latents(tuned))
    assert (lora.rank, lora.alpha) == (2, alpha)


def _kohya_z_image(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, half = name.partition(".lora_")
        own = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{own}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value
        found[f"{own}.alpha"] = torch.tensor(3.0)
    return found


Z_IMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], bool, int]] = {
    "kohya": (_kohya_z_image, True, 2),
    "ai-toolkit": (_prefixed("diffusion_model.", alpha=False), True, 2),
    "ai-toolkit with alphas": (_prefixed("diffusion_model.", alpha=True), True, 2),
    "transformer": (_prefixed("transformer.", alpha=False), True, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["zimage"], indirect=True)
@pytest.mark.parametrize("kind", Z_IMAGE)
def test_files_of_z_image_of_other_tools_are_read(folder: Path, tmp_path: Path, kind: str) -> None:
    write, readable, alpha = Z_IMAGE[kind]
    tuned = perturbed(folder)
    weights = {name: value.clone() for name, value in lora_weights(tuned.denoiser).items()}
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous().clone() for name, value in write(weights).items()}, path)
    check = read_by_both if readable else read_by_us
    lora = check(folder, path, adapted(tuned.denoiser), latents(tuned))
    assert (lora.rank, lora.alpha) == (2, alpha)


@pytest.mark.parametrize("folder", ["flux_dev"], indirect=True)
def test_loras_of_other_families_and_kinds_are_refused(folder: Path, tmp_path: Path) -> None:
    pipeline, path = TextToImagePipeline(str(folder), **SIZE), tmp_path / "x.safetensors"
    layer = "transformer.transformer_blocks.0.attn.to_q"
    both = {
        f"{layer}.lora_A.weight": torch.ones(2, 32),
        f"{layer}.lora_B.weight": torch.ones(32, 2),
    }
    for weights, sentence in (
        ({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (2, 2)}, "is a LoRA of a U-Net"),
        ({"lora_unet_down_blocks_1_proj_in.lora_down.weight": (2, 2)}, "is a LoRA of a U-Net"),
        ({"lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight": (2, 2)}, "original code"),
        ({f"{layer}.lora_magnitude_vector": (2,)}, "has DoRA"),
        ({"lora_unet_double_blocks_0_img_mlp_0.hada_w1_a": (2, 2)}, "has LoHa"),
        ({f"{layer}.alpha": ()}, None),
    ):
        tensors = {name: torch.ones(shape) for name, shape in weights.items()}
        save_file({**(both if sentence is None or layer in str(weights) else {}), **tensors}, path)
        if sentence is None:
            assert completed(LoRA(pretrained=str(path)), pipeline).alpha == 1
            continue
        with pytest.raises(UsageError, match=sentence) as caught:
            completed(LoRA(pretrained=str(path)), pipeline)
        assert str(caught.value).startswith("model.init_args.lora.pretrained: ")
