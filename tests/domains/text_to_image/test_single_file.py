"""Single files, custom VAEs, textual inversions: loaded as diffusers' folders are, or refused."""

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.families.original import as_one_file, of_two_widths
from tests.domains.text_to_image.families.tiny import tiny

SIZE = {"height": 32, "width": 32}
Model = tuple[str, Path, Path, Path]


SLOW = pytest.mark.slow
ALL = ["sdxl", *(pytest.param(name, marks=SLOW) for name in ("sd", "sd3", "flux_dev"))]
SD = ["sd", *(pytest.param(name, marks=SLOW) for name in ("sdxl", "sd3", "flux_dev"))]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a family's name, its folder, its single file, and what completes that."""
    path = tmp_path_factory.mktemp("single")
    pipe = of_two_widths(request.param)
    pipe.save_pretrained(path / "folder")
    save_file(as_one_file(request.param, pipe), path / "whole.safetensors")
    if request.param == "flux_dev":  # its file is of the transformer alone
        shutil.copytree(path / "folder", path / "configs")
        shutil.rmtree(path / "configs" / "transformer")
        (path / "configs" / "transformer").mkdir()
        shutil.copy(path / "folder" / "transformer" / "config.json", path / "configs/transformer")
    else:
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(path / "folder", path / "configs", ignore=ignored)
    return request.param, path / "folder", path / "whole.safetensors", path / "configs"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let diffusers' converter, which knows FLUX.1 at 3072 numbers alone, split 32."""
    original = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = inspect.getsource(original)
    assert "inner_dim = 3072" in code
    names = dict(vars(single_file_utils))
    exec(code.replace("inner_dim = 3072", "inner_dim = 32"), names)
    table = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(table, "checkpoint_mapping_fn", names[original.__name__])
    yield


def weights(pipeline: TextToImagePipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value
        for part, network in pipeline.diffusers.components.items()
        if isinstance(network, torch.nn.Module)
        for name, value in network.state_dict().items()
    }


@torch.no_grad()
def picture(pipeline: TextToImagePipeline) -> Tensor:
    condition = pipeline.encode({"prompt": ["a red ring"]})
    x = torch.linspace(-1, 1, pipeline.blank(condition).numel()).view_as(pipeline.blank(condition))
    prediction = pipeline(x, torch.tensor([0.6]), condition)
    assert isinstance(prediction, Tensor)
    return pipeline.decode(prediction, condition)


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_a_single_file_is_the_folder_in_one(model: Model, tmp_path: Path) -> None:
    _, folder, file, configs = model
    single = TextToImagePipeline(str(file), config=str(configs), **SIZE)
    whole = TextToImagePipeline(str(folder), **SIZE)
    assert single.name == "whole"
    expected, found = weights(whole), weights(single)
    assert found.keys() == expected.keys()
    assert not [n for n, value in expected.items() if not torch.equal(found[n], value)]
    # Weights that lie elsewhere in memory may be multiplied in another order.
    torch.testing.assert_close(picture(single), picture(whole), atol=1e-5, rtol=0)
    single.save(tmp_path / "saved")  # as full fine-tuning does
    again = weights(TextToImagePipeline(str(tmp_path / "saved"), **SIZE))
    assert not [n for n, value in expected.items() if not torch.equal(again[n], value)]
    with without_weights():
        bare = TextToImagePipeline(str(file), config=str(configs), **SIZE)
    assert {n: v.shape for n, v in weights(bare).items()}.items() >= {
        (n, v.shape) for n, v in expected.items() if n.startswith(("unet.", "transformer."))
    }


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_what_a_single_file_lacks_is_named(model: Model, tmp_path: Path) -> None:
    name, folder, file, configs = model
    held = load_file(file)
    part = {"sd3": "text_encoders.t5xxl", "sdxl": "conditioner.", "sd": "cond_stage"}
    if name in part:  # a part comes from the folder, where that has it
        save_file(
            {n: v for n, v in held.items() if part[name] not in n}, tmp_path / "a.safetensors"
        )
        encoder = "text_encoder_3" if name == "sd3" else "text_encoder"
        sentence = rf"config: a.safetensors has no {encoder} in it, .* give a folder or hub id"
        with pytest.raises(UsageError, match=sentence):
            TextToImagePipeline(str(tmp_path / "a.safetensors"), config=str(configs), **SIZE)
        filled = TextToImagePipeline(str(tmp_path / "a.safetensors"), config=str(folder), **SIZE)
        whole = weights(TextToImagePipeline(str(folder), **SIZE))
        assert all(torch.equal(whole[n], value) for n, value in weights(filled).items())
    if name == "sdxl":
        half = {n: v for n, v in held.items() if not n.startswith("conditioner.embedders.1")}
        save_file(half, tmp_path / "b.safetensors")
        with pytest.raises(UsageError, match="has one of its two text encoders alone; give"):
            TextToImagePipeline(str(tmp_path / "b.safetensors"), config=str(configs), **SIZE)
    with pytest.raises(UsageError, match=r"config: .* those of .* cannot be read here; set it to"):
        TextToImagePipeline(str(file), config=str(tmp_path), **SIZE)


def one(path: Path, **tensors: tuple[int, ...]) -> str:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    return str(path)


FILES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "lora": ({"lora_unet_x.lora_down.weight": (1,)}, "is a LoRA; set model.init_args.lora.pretr"),
    "vae": ({"decoder.up.0.block.0.norm1.weight": (1,)}, "is a VAE alone; set .*init_args.vae to"),
    "clip": ({"text_model.final_layer_norm.weight": (1,)}, "is a text encoder alone; give the"),
    "t5": ({"encoder.block.0.x": (1,), "shared.weight": (1,)}, "is a text encoder alone"),
    "inversion": ({"emb_params": (1, 4)}, "is a textual inversion; set .*textual_inversions"),
    "controlnet": ({"control_model.time_embed.0.weight": (1,)}, "is a ControlNet; give the model"),
    "denoiser": ({"down_blocks.0.x": (1,)}, "denoiser of a diffusers folder alone; give the whole"),
    "quantised": ({"double_blocks.0.x": (1,), "scaled_fp8": (1,)}, "quantised weights"),
    "edm": ({"model.diffusion_model.x": (1,), "edm_mean": (4,)}, "was trained in EDM's way"),
    "refiner": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (1,),
            "conditioner.embedders.0.model.x": (1,),
        },
        "is the refiner of Stable Diffusion XL",
    ),
    "inpainting": (
        {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
        "reads 9 channels, not 4, as for inpainting",
    ),
    "chroma": (
        {"double_blocks.0.x": (1,), "single_blocks.0.x": (1,), "distilled_guidance_layer.x": (1,)},
        "of none of the models that are known",
    ),
    "other": ({"blocks.0.x": (1,)}, "holds weights such as blocks.0.x, of none of the models"),
    "nothing": ({}, "holds no weights, of none"),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_refused_with_their_place(tmp_path: Path, kind: str) -> None:
    tensors, sentence = FILES[kind]
    with pytest.raises(UsageError, match=sentence) as caught:
        TextToImagePipeline(one(tmp_path / "x.safetensors", **tensors))
    assert str(caught.value).startswith("pipeline.init_args.pretrained: ")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8")],
)
def test_quantised_weights_are_refused_by_their_type(
    tmp_path: Path, dtype: torch.dtype, said: str
) -> None:
    pipe = of_two_widths("sd")
    pipe.save_pretrained(tmp_path / "f")
    places = {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    held = as_one_file("sd", pipe) | {name: torch.arange(77)[None] for name in places}
    given = {"config": str(tmp_path / "f"), **SIZE}
    half = {n: v if n in places else v.half() for n, v in held.items()}
    save_file(half, tmp_path / "half.safetensors")
    TextToImagePipeline(str(tmp_path / "half.safetensors"), **given)
    low = {n: v.to(dtype) if v.ndim > 1 and n not in places else v for n, v in held.items()}
    save_file(low, tmp_path / "x.safetensors")
    sentence = rf"pretrained: .* quantised weights, such as \S+ in {said}, .* bfloat16 or float16"
    with pytest.raises(UsageError, match=sentence):
        TextToImagePipeline(str(tmp_path / "x.safetensors"), **given)
    with pytest.raises(UsageError, match=sentence.replace("pretrained", "vae")):
        TextToImagePipeline(str(tmp_path / "f"), vae=str(tmp_path / "x.safetensors"), **SIZE)


DAMAGES = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS",
    ),
    "page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "pickle": (b"PK\x03\x04 and so on", "is a pickle of torch's by its content"),
    "gguf": (b"GGUF\x03", "whose weights are quantised"),
    "empty": (b"", "is empty"),
    "noise": (b"\x00" * 100, "is no safetensors file"),
    "cut": (b'\x99\x00\x00\x00\x00\x00\x00\x00{"a":', r"has \d+ of (more|\d+) bytes"),
}


@pytest.mark.parametrize(
    ("setting", "damage"),
    [
        *(("pretrained", damage) for damage in DAMAGES),
        ("vae", "pointer"),
        ("textual_inversions", "page"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: str, setting: str) -> None:
    content, sentence = DAMAGES[damage]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    given: Any = [str(path)] if setting == "textual_inversions" else str(path)
    with pytest.raises(UsageError, match=rf"^pipeline.init_args.{setting}: .*{sentence}"):
        TextToImagePipeline(**{setting: given})


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_a_half_downloaded_file_is_named_alone_and_in_a_folder(
    tmp_path: Path, model: Model
) -> None:
    _, folder, file, configs = model
    half = tmp_path / "half.safetensors"
    half.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"pretrained: .*half\.safetensors has \d+ of \d+ bytes"):
        TextToImagePipeline(str(half), config=str(configs))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = (copy / "vae").glob("*.safetensors")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UsageError, match=r"pretrained: .*vae.* is a pointer of Git LFS"):
        TextToImagePipeline(str(copy), **SIZE)


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_a_weight_that_is_not_there_is_named(tmp_path: Path, model: Model) -> None:
    _, _, file, configs = model
    held = load_file(file)
    dropped = next(n for n in held if "proj_out.weight" in n or "final_layer.linear.weight" in n)
    held.pop(dropped)
    save_file(held, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"^pipeline\.init_args\.pretrained: ") as caught:
        TextToImagePipeline(str(tmp_path / "x.safetensors"), config=str(configs), **SIZE)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_settings_that_do_not_go_with_files(tmp_path: Path, model: Model) -> None:
    _, folder, file, configs = model
    for settings, sentence in (
        ({"variant": "fp16"}, "init_args.variant is for folders"),
        ({"from_scratch": True}, "init_args.from_scratch is for folders"),
    ):
        with pytest.raises(UsageError, match=sentence):
            TextToImagePipeline(str(file), config=str(configs), **settings)
    with pytest.raises(UsageError, match=r"pretrained: there is no file nowhere.safetensors"):
        TextToImagePipeline("nowhere.safetensors", config=str(configs))
    with pytest.raises(UsageError, match=r"init_args.config goes with a single file"):
        TextToImagePipeline(str(folder), config=str(configs))
    shutil.copytree(configs, tmp_path / "other")
    index = json.loads((configs / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "SanaPipeline"})
    )
    with pytest.raises(UsageError, match=r"config: .* is a SanaPipeline, but .* is a"):
        TextToImagePipeline(str(file), config=str(tmp_path / "other"))


def test_a_pickled_checkpoint_is_refused_with_its_conversion(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match="is a pickle, which can run code; convert it: "):
        TextToImagePipeline(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
def test_a_file_that_says_that_it_predicts_v_needs_such_a_scheduler(
    tmp_path: Path, marks: tuple[str, ...]
) -> None:
    """As NoobAI's files, in whose names for them no value stands."""
    pipe = of_two_widths("sdxl")
    pipe.save_pretrained(tmp_path / "f")
    held = as_one_file("sdxl", pipe) | {mark: torch.empty(0) for mark in marks}
    save_file(held, tmp_path / "x.safetensors")
    file, path = str(tmp_path / "x.safetensors"), tmp_path / "f/scheduler/scheduler_config.json"
    given = {"config": str(tmp_path / "f"), **SIZE}
    told = '"prediction_type": "v_prediction"'
    told += ' and "rescale_betas_zero_snr": true' if "ztsnr" in marks else ""
    wanted = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    epsilon = json.loads(path.read_text())
    wrong = [epsilon, epsilon | wanted] if "ztsnr" in marks else [epsilon]
    for scheduler in wrong:
        path.write_text(json.dumps(scheduler))
        for plan in (False, True):
            with (
                pytest.raises(
                    UsageError, match=rf"^pipeline\.init_args\.config: .*asks for {told}, but"
                ),
                without_weights() if plan else nullcontext(),
            ):
                TextToImagePipeline(file, **given)
    wanted |= {"rescale_betas_zero_snr": "ztsnr" in marks}
    path.write_text(json.dumps(epsilon | wanted))
    pipeline = TextToImagePipeline(file, guidance_scale=3.0, **given)
    assert pipeline.process.prediction_type == "v"
    plain = StableDiffusionXLPipeline.from_single_file(file, config=str(tmp_path / "f"))
    assert plain.scheduler.config.prediction_type == "v_prediction"
    assert torch.allclose(drawn(pipeline), drawn_by_diffusers(plain), atol=1e-3)
    index = json.loads((tmp_path / "f/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]  # it would overlook zero SNR
    (tmp_path / "f/model_index.json").write_text(json.dumps(index))
    if "ztsnr" in marks:
        with pytest.raises(UsageError, match=r"config: .* the PNDMScheduler of .* such as Euler"):
            TextToImagePipeline(file, **given)


@torch.no_grad()
def drawn(pipeline: TextToImagePipeline) -> Tensor:
    condition, noise = pipeline.encode({"prompt": ["a red ring"]}), generators([3])
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
    x_0 = Sampler(4, 0.0).sample(pipeline, pipeline.process, x_1, condition, noise)
    return pipeline.decode(x_0, condition)


def drawn_by_diffusers(plain: Any) -> Tensor:
    (noise,) = generators([3])
    z = torch.randn(1, 4, 16, 16, generator=noise)
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", **SIZE}
    pictures = plain("a red ring", latents=z, **settings).images
    assert float(pictures.std()) > 0.02
    return pictures


@pytest.mark.parametrize("model", SD, indirect=True)
def test_a_vae_takes_the_place_of_the_models_own(tmp_path: Path, model: Model) -> None:
    name, folder, file, configs = model
    other = tiny(name, seed=5).vae
    other.save_pretrained(tmp_path / "vae")
    tiny(name, seed=5).vae.save_pretrained(tmp_path / "pipeline" / "vae")
    save_file(
        {n.removeprefix("first_stage_model."): v for n, v in as_one_file("sd", tiny("sd")).items()}
        if name == "sd"
        else dict(other.state_dict()),
        tmp_path / "vae.safetensors",
    )
    own = TextToImagePipeline(str(folder), **SIZE)
    sources = [str(tmp_path / "vae"), str(tmp_path / "pipeline")]
    if name != "sd":
        sources.append(str(tmp_path / "vae.safetensors"))
    for source in sources:
        pipeline = TextToImagePipeline(str(folder), vae=source, **SIZE)
        found = pipeline.vae.state_dict()
        assert all(torch.equal(found[n], value) for n, value in other.state_dict().items())
        assert not any(p.requires_grad for p in pipeline.vae.parameters())
    assert not torch.equal(picture(pipeline), picture(own))
    single = TextToImagePipeline(str(file), config=str(configs), vae=sources[0], **SIZE)
    # As above: weights that lie elsewhere in memory.
    torch.testing.assert_close(picture(single), picture(pipeline), atol=1e-5, rtol=0)
    with without_weights():
        TextToImagePipeline(str(folder), vae=sources[0], **SIZE)


@pytest.mark.parametrize("lacking", ["its own", "the model's", "both"])
def test_a_vae_whose_config_lacks_the_scale_has_its_classs(tmp_path: Path, lacking: str) -> None:
    """As stabilityai/sd-vae-ft-mse, and Stable Diffusion 1.5's own."""
    folder, path = tmp_path / "sd", tmp_path / "vae"
    tiny("sd").save_pretrained(folder)
    tiny("sd", seed=5).vae.save_pretrained(path)
    own, others = path / "config.json", folder / "vae" / "config.json"
    whole = json.loads(own.read_text())
    assert whole["scaling_factor"] == 0.18215
    less = {key: value for key, value in whole.items() if key != "scaling_factor"}
    for file in {"its own": [own], "the model's": [others], "both": [own, others]}[lacking]:
        file.write_text(json.dumps(less))
    pipeline = TextToImagePipeline(str(folder), vae=str(path), **SIZE)
    assert pipeline.vae.config["scaling_factor"] == 0.18215
    for file in (others, own):
        file.write_text(json.dumps(less))
    (own if lacking == "the model's" else others).write_text(
        json.dumps(less | {"scaling_factor": 0.13025})
    )
    with pytest.raises(UsageError, match=r"scaling_factor 0\.(18215|13025), and the model's own"):
        TextToImagePipeline(str(folder), vae=str(path), **SIZE)


@pytest.mark.parametrize("model", SD, indirect=True)
def test_a_vae_of_other_latents_is_refused(tmp_path: Path, model: Model) -> None:
    _, folder, _, _ = model
    path = tmp_path / "vae"
    tiny("sd").vae.save_pretrained(path)
    config = json.loads((folder / "vae" / "config.json").read_text())
    for name, value in (("scaling_factor", 0.5), ("latent_channels", 5)):
        (path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(UsageError, match=rf"init_args.vae: .* has {name} {value}, and the mo"):
            TextToImagePipeline(str(folder), vae=str(path), **SIZE)
    (path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderDC"}))
    with pytest.raises(UsageError, match="is of class AutoencoderDC, not an AutoencoderKL"):
        TextToImagePipeline(str(folder), vae=str(path), **SIZE)
    lora = one(tmp_path / "x.safetensors", **{"lora_unet_x.lora_down.weight": (1,)})
    with pytest.raises(
        UsageError, match=r"init_args.vae: .*x.safetensors (is no VAE|could not be)"
    ):
        TextToImagePipeline(str(folder), vae=lora, **SIZE)
    with pytest.raises(UsageError, match=r"init_args.vae: .*nowhere' could not be loaded; give"):
        TextToImagePipeline(str(folder), vae=str(tmp_path / "nowhere"), **SIZE)


@pytest.mark.parametrize("name", ["shift_factor", "latents_mean", "latents_std"])
@pytest.mark.parametrize("whose", ["its own", "the model's"])
def test_a_vae_of_latents_with_other_statistics_is_refused(
    tmp_path: Path, name: str, whose: str
) -> None:
    value = 0.5 if name == "shift_factor" else [0.1, 0.2, 0.3, 0.4]
    tiny("sdxl").save_pretrained(tmp_path / "f")
    tiny("sdxl").vae.save_pretrained(tmp_path / "vae")
    path = {"its own": tmp_path / "vae", "the model's": tmp_path / "f" / "vae"}[whose]
    config = json.loads((path / "config.json").read_text())
    assert config[name] is None
    without = {key: held for key, held in config.items() if key != name}
    for zero in (without, config | {"shift_factor": 0.0}):  # as none, in diffusers too
        (path / "config.json").write_text(json.dumps(zero))
        TextToImagePipeline(str(tmp_path / "f"), vae=str(tmp_path / "vae"), **SIZE)
    (path / "config.json").write_text(json.dumps(config | {name: value}))
    theirs, ours = (value, None) if whose == "its own" else (None, value)
    said = re.escape(f"has {name} {theirs}, and the model's own VAE {ours}; give a VAE")
    with pytest.raises(UsageError, match=rf"init_args\.vae: .*{said}"):
        TextToImagePipeline(str(tmp_path / "f"), vae=str(tmp_path / "vae"), **SIZE)


@pytest.mark.parametrize("model", SD, indirect=True)
def test_textual_inversions_are_tokens_of_prompts(tmp_path: Path, model: Model) -> None:
    name, folder, _, _ = model
    path = tmp_path / "my-style.safetensors"
    vectors = {"emb_params": torch.linspace(-1, 1, 64).reshape(2, 32)}
    if name == "sdxl":
        vectors = {"clip_l": vectors["emb_params"], "clip_g": torch.linspace(-1, 1, 32).view(2, 16)}
    save_file(vectors, path)
    if name in ("sd3", "flux_dev"):
        with pytest.raises(UsageError, match="textual_inversions: "):
            TextToImagePipeline(str(folder), textual_inversions=[str(path)], **SIZE)
        return
    pipeline = TextToImagePipeline(str(folder), textual_inversions=[str(path)], **SIZE)
    tokenizer, encoder = pipeline.diffusers.tokenizer, pipeline.diffusers.text_encoder
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("my-style", "my-style_1")]
    learned = encoder.get_input_embeddings().weight[ids]
    assert torch.equal(learned, vectors.get("emb_params", vectors.get("clip_l")))
    tables = pipeline.encode({"prompt": ["a ring, my-style", "a ring, my style"]}).tables
    assert not torch.equal(tables["embedding"][0], tables["embedding"][1])
    ids_of_prompt = tokenizer(pipeline.diffusers.maybe_convert_prompt("my-style", tokenizer))
    assert set(ids) <= set(ids_of_prompt.input_ids)
    save_file({"emb_params": torch.zeros(1, 7)}, path)
    with pytest.raises(UsageError, match=r"textual_inversions: .*(numbers|no clip_l)"):
        TextToImagePipeline(str(folder), textual_inversions=[str(path)], **SIZE)
    with pytest.raises(UsageError, match=r"textual_inversions: there is no file"):
        TextToImagePipeline(str(folder), textual_inversions=["nowhere.safetensors"], **SIZE)
