"""The model card of a tuned model: what it says, where it goes, and that its code runs."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image import EMBEDDED
from domains.text_to_image.card import Beside, hub_header, usage
from domains.text_to_image.data import ShapesPrompts
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.callbacks.ema import EMA
from lit_rlft.callbacks.run_files import RunFiles
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import TopK
from lit_rlft.loop.reference import LoRA, adapt
from lit_rlft.runs.card import write_card
from lit_rlft.runs.readme import README, add_results, readme
from tests.domains.text_to_image.families.original import as_one_file
from tests.domains.text_to_image.families.tiny import tiny
from tests.support import trainer_of

RECIPES = sorted((Path(__file__).parents[2] / "configs/experiments").glob("*.yaml"))
LORA = ["pytorch_lora_weights.safetensors"]
FACTS = {"num_steps": 2, "tuned_steps": 2}
CALL = {"guidance_scale": 2.0}


def header(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("lora", [LoRA(rank=2), None])
def test_a_run_writes_its_card_and_a_test_its_numbers(
    tiny_stable_diffusion: Callable[..., Path],
    lora: LoRA | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_stable_diffusion()
    pipeline = TextToImagePipeline(str(folder), guidance_scale=2.0)
    settings: dict[str, Any] = {"num_candidates": 2, "selection": TopK(1), "num_eval_samples": 1}
    tuner = PGRAFT(pipeline, Brightness(), sampler=Sampler(2), lora=lora, cut=0.5, **settings)
    data = ShapesPrompts(num_train_prompts=2, num_val_prompts=2, num_test_prompts=2, batch_size=2)
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[RunFiles(1), EMA(0.5)])
    trainer.fit(tuner, data)
    (path,) = tmp_path.rglob(f"tuned/{README}")
    text = path.read_text()
    found, name = header(text), tuner.reward.name
    assert found["library_name"] == "diffusers" and ("lora" in found["tags"]) == bool(lora)
    assert "base_model" not in found  # it is a folder of this machine
    assert f"# tiny, tuned for {name}" in text and "1 updates" in text
    assert "| model.cut | 0.5 |" in text and "licence applies" in text
    assert "first 1 of 2 steps; the base" in text and "lit-rlft test --config" in text
    assert "average over training (EMA, decay 0.5)" in text
    written = [text, *(path.read_text() for path in path.parent.rglob("*.json"))]
    for private in (str(folder.parent), str(tmp_path), str(Path.home())):
        assert not any(private in each for each in written)
    trainer.test(tuner, data, verbose=False)
    (metrics,) = tmp_path.rglob("metrics.json")
    mean = yaml.safe_load(metrics.read_text())["tuned"][name]["mean"]
    tested = path.read_text()
    assert f"| {mean:.4g} ± " in tested and "lit-rlft test --config" not in tested
    assert tested.split("## Settings")[1] == text.split("## Settings")[1]

    # What it shows runs beside the folder, with the base where its name says.
    (path.parent.parent / "tiny").symlink_to(folder)
    monkeypatch.chdir(path.parent.parent)
    blocks = code(tested)
    assert len(blocks) == (2 if lora else 1) and "load_tuned" in blocks[0]
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["picture"].size == (16, 16)


def test_a_card_of_another_model_keeps_its_numbers(tmp_path: Path) -> None:
    facts = {"algorithm": "GRAFT", "reward": "r", "num_rounds": 1, "num_samples": 2}
    text = readme({**facts, "num_updates": 3}, {"a|b": "x|y", "n.length": 3}, {}, "base", "")
    assert text.startswith("# base, tuned for r") and r"x\|y" in text and "length" not in text
    (tmp_path / README).write_text(text)
    report = {"num_samples": 4, "seed": 0, "reference": {}, "gain": {}}
    report["tuned"] = {"r": {"mean": 1.0, "sem": None}}
    assert add_results(tmp_path, report, 3) is None  # it is no tuned model's folder
    write_card(tmp_path, {"num_updates": 3})
    assert add_results(tmp_path, report, 4) is None and (tmp_path / README).read_text() == text
    for _ in range(2):  # a second test takes the place of the first
        assert add_results(tmp_path, report, 3) == tmp_path / README
        assert (tmp_path / README).read_text().count("| r |  | 1 |  |") == 1
    (tmp_path / README).write_text("mine")
    assert add_results(tmp_path, report, 3) is None and (tmp_path / README).read_text() == "mine"


def test_what_the_hub_reads() -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    found = hub_header(base, LORA)
    assert found["base_model"] == base and found["base_model_relation"] == "adapter"
    assert hub_header(base, ["unet"])["base_model_relation"] == "finetune"
    assert "base_model" not in hub_header("shapes", LORA)
    assert "base_model" not in hub_header("/home/me/models/sdxl", LORA)


def test_a_corrector_is_no_model_of_pictures() -> None:
    files = ["corrector.json", "model_index.json", "unet"]
    assert hub_header("a/b", files) == {}
    facts = {**FACTS, "tuned_steps": 0}
    assert usage("StableDiffusionPipeline", "a/b", Beside(), files, facts, CALL) == ""


@pytest.mark.parametrize(
    ("kind", "base", "config", "expected"),
    [
        ("FluxPipeline", "a/b", None, 'FluxPipeline.from_pretrained("a/b")'),
        (
            "FluxPipeline",
            "/x/f.safetensors",
            "a/b",
            'from_pretrained("a/b", transformer=transformer)',
        ),
        ("FluxPipeline", "/x/f.safetensors", None, 'from_single_file("f.safetensors")'),
        ("StableDiffusionXLPipeline", "/x/f.safetensors", "/y/c", '"f.safetensors", config="c")'),
        ("StableDiffusionXLPipeline", "/x/folder", None, 'Pipeline.from_pretrained("folder")'),
    ],
)
def test_a_base_of_this_machine_is_named_without_its_path(
    kind: str, base: str, config: str | None, expected: str
) -> None:
    text = usage(kind, base, Beside(config), LORA, FACTS, CALL)
    assert expected in text and "/x/" not in text and "/y/" not in text
    for block in code(text):
        compile(block, "card", "exec")
    assert "load_lora_weights" not in usage(
        kind, base, Beside(config), ["noise_generator.safetensors"], FACTS, CALL
    )
    assert 'from_pretrained("tuned")' in usage(kind, base, Beside(config), ["unet"], FACTS, CALL)


PROMPT = "a ring, my-style"
SIZE: dict[str, Any] = {"height": 32, "width": 64}


@pytest.mark.parametrize(
    ("name", "own", "told"),
    [
        ("sd", {"negative_prompt": 'a "dull" one', "guidance_scale": 3.0}, "negative_prompt='a"),
        ("sdxl", {"original_size": (64, 48), "crop": (4, 8)}, "crops_coords_top_left=(4, 8)"),
        (
            "flux_dev",
            {"true_cfg_scale": 2.5, "negative_prompt": "dull", "max_sequence_length": 24},
            "true_cfg_scale=2.5",
        ),
        ("flux_schnell", {}, "max_sequence_length=256"),
        ("klein", {"max_sequence_length": 64}, 'prompt="a red ring"'),
        ("klein_distilled", {}, "guidance_scale=1"),
        ("sana", {}, "use_resolution_binning=False"),
        (
            "zimage",
            {"cfg_normalization": 0.9, "cfg_truncation": 0.5, "max_sequence_length": 64},
            "cfg_normalization=0.9",
        ),
    ],
)
def test_the_cards_code_draws_what_the_run_draws(
    name: str, own: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(name).save_pretrained(tmp_path / "tuned")
    pipeline = TextToImagePipeline(str(tmp_path / "tuned"), **SIZE, **own)
    condition, noise = pipeline.encode({"prompt": ["a red ring"]}), generators([3])
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = Sampler(3).sample(pipeline, pipeline.process, x_1, condition, noise)
        expected = pipeline.decode(x_0, condition)
    (text,) = code(pipeline.usage(["transformer"], {"num_steps": 3, "tuned_steps": 3}))
    assert told in text and "height=32" in text and "width=64" in text
    assert max(map(len, text.splitlines())) <= 90
    latents = x_1 if name[:4] != "flux" else FluxPipeline._pack_latents(x_1, *x_1.shape)
    given = {"latents": latents, "output_type": "pt"}
    names: dict[str, Any] = {"given": given}
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"\bpipe\(\s*(prompt=)?", "pipe(**given, prompt=", text), names)
    torch.testing.assert_close(names["picture"], expected[0], atol=2e-4, rtol=0)


def whole(name: str, path: Path) -> str:
    tiny(name).save_pretrained(path)
    return str(path)


def half(path: Path) -> str:
    tiny("sd").to(torch.float16).save_pretrained(path, variant="fp16")
    return str(path)


def vae(path: Path, within: bool = False) -> str:
    other = tiny("sd", seed=7)
    (other if within else other.vae).save_pretrained(path)
    return str(path)


def vae_file(path: Path) -> str:
    save_file(as_one_file("sd", tiny("sd", seed=7)), path)
    return str(path)


def token(path: Path, **vectors: int) -> str:
    numbers = torch.Generator().manual_seed(5)
    rows = {name: torch.randn(2, width, generator=numbers) for name, width in vectors.items()}
    save_file(rows, path)
    return str(path)


def embedded_vae(path: Path) -> str:
    """Write the VAE of "shapes" as a file of its own."""
    shutil.copy(EMBEDDED / "shapes" / "vae" / "diffusion_pytorch_model.safetensors", path)
    return str(path)


BESIDE: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "an embedded model": (
        lambda path: {"pretrained": "shapes"},
        'str(EMBEDDED / "shapes")',
    ),
    "an embedded model and a VAE in a file": (
        lambda path: {"pretrained": "shapes", "vae": embedded_vae(path / "other.safetensors")},
        'config=str(EMBEDDED / "shapes")',
    ),
    "a variant that is found": (
        lambda path: {"pretrained": half(path / "model")},
        'variant="fp16"',
    ),
    "a VAE": (
        lambda path: {"pretrained": whole("sd", path / "model"), "vae": vae(path / "other")},
        'AutoencoderKL.from_pretrained("other", torch_dtype=torch.float32)',
    ),
    "a VAE in a model's folder, beside a variant": (
        lambda path: {
            "pretrained": half(path / "model"),
            "variant": "fp16",
            "vae": vae(path / "other", within=True),
        },
        'AutoencoderKL.from_pretrained("other", subfolder="vae", torch_dtype=torch.float32)',
    ),
    "a VAE in a file": (
        lambda path: {
            "pretrained": whole("sd", path / "model"),
            "vae": vae_file(path / "other.safetensors"),
        },
        '"other.safetensors",\n    config="model",\n    subfolder="vae",\n',
    ),
    "a token": (
        lambda path: {
            "pretrained": whole("sd", path / "model"),
            "textual_inversions": [token(path / "my-style.safetensors", emb_params=32)],
        },
        'pipe.load_textual_inversion("my-style.safetensors", token="my-style")',
    ),
    "a token that the file names": (
        lambda path: {
            "pretrained": whole("sd", path / "model"),
            "textual_inversions": [token(path / "x.safetensors", **{"my-style": 32})],
        },
        'pipe.load_textual_inversion("x.safetensors")',
    ),
    "a token of two encoders": (
        lambda path: {
            "pretrained": whole("sdxl", path / "model"),
            "textual_inversions": [token(path / "my-style.safetensors", clip_l=32, clip_g=32)],
        },
        'vectors["clip_g"]',
    ),
}


@pytest.mark.parametrize("what", BESIDE)
def test_the_cards_code_loads_what_the_run_loads_beside_the_model(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = BESIDE[what]
    pipeline = TextToImagePipeline(**made(tmp_path), **SIZE)
    adapt(pipeline, LoRA(rank=2, alpha=2), seed=0)
    files = [path.name for path in pipeline.save(tmp_path / "tuned")]
    write_card(tmp_path / "tuned", FACTS)
    condition, noise = pipeline.encode({"prompt": ["a ring, my-style"]}), generators([3])
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = Sampler(2).sample(pipeline, pipeline.process, x_1, condition, noise)
        expected = pipeline.decode(x_0, condition)
    blocks = code(text := pipeline.usage(files, FACTS))
    assert told in text and str(tmp_path) not in text and len(blocks) == 2
    assert max(map(len, "".join(blocks).splitlines())) <= 90
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names: dict[str, Any] = {"given": {"latents": x_1, "output_type": "pt"}}
        exec(block.replace("pipe(", "pipe(**given, prompt=").replace("a red ring", PROMPT), names)
        torch.testing.assert_close(names["picture"], expected[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("files", [LORA, ["unet"]])
@pytest.mark.parametrize(
    ("kind", "eta", "told"),
    [
        ("DDIMScheduler", 1.0, "eta=1"),
        ("PNDMScheduler", 0.0, "pipe.scheduler = DDIMScheduler.from_config("),
        ("PNDMScheduler", 1.0, "eta=1"),
        ("DPMSolverMultistepScheduler", 1.0, "algorithm_type='sde-dpmsolver++'"),
    ],
)
def test_the_cards_code_takes_the_steps_of_the_run(
    kind: str,
    eta: float,
    told: str,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("sd")
    model.scheduler = getattr(diffusers, kind).from_config(model.scheduler.config)
    model.save_pretrained(tmp_path / "model")
    pipeline = TextToImagePipeline(str(tmp_path / "model"), **SIZE)
    if files is LORA:
        adapt(pipeline, LoRA(rank=2, alpha=2), seed=0)
    pipeline.save(tmp_path / "tuned")
    facts: dict[str, Any] = {"num_steps": 4, "tuned_steps": 4, "eta": eta, "transition": "eta"}
    facts |= pipeline.tuned_facts(facts)
    write_card(tmp_path / "tuned", facts)
    condition, noise = pipeline.encode({"prompt": ["a red ring"]}), generators([3])
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = Sampler(4, eta).sample(pipeline, pipeline.process, x_1, condition, noise)
        expected = pipeline.decode(x_0, condition)
    blocks = code(text := pipeline.usage(files, facts))
    assert told in blocks[-1] and len(blocks) == (2 if files is LORA else 1)
    assert ("not with those of" in text) == (kind != "DDIMScheduler")
    assert max(map(len, "".join(blocks).splitlines())) <= 90
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        given = {"generator": torch.Generator().manual_seed(3), "output_type": "pt"}
        names: dict[str, Any] = {"given": given}
        exec(block.replace("pipe(", "pipe(**given, prompt="), names)
        torch.testing.assert_close(names["picture"], expected[0], atol=2e-4, rtol=0)


def test_the_code_of_a_whole_model_in_half_precision_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole("sd", tmp_path / "model")
    pipeline = TextToImagePipeline(str(tmp_path / "model"), save_dtype="float16", **SIZE)
    pipeline.save(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    exec(code(pipeline.usage(["unet"], FACTS))[0], names := {})
    assert names["picture"].size == (64, 32)


@pytest.mark.parametrize(
    ("alpha", "web_lora", "told"),
    [
        (4, True, ""),
        (8, True, "rank 4 and alpha 8, which its metadata say; give `web_lora.safetensors` to"),
        (8, False, "rank 4 and alpha 8, which its metadata say; take strength 2 in programs"),
    ],
)
def test_a_card_says_where_alpha_is_not_the_rank(
    alpha: int, web_lora: bool, told: str, tmp_path: Path
) -> None:
    tiny("flux_dev").save_pretrained(tmp_path / "flux")
    pipeline = TextToImagePipeline(str(tmp_path / "flux"), web_lora=web_lora, **SIZE)
    assert "alpha" not in pipeline.usage(["transformer"], FACTS)
    adapt(pipeline, LoRA(rank=4, alpha=alpha), seed=0)
    files = [path.name for path in pipeline.save(tmp_path / "tuned")]
    text = pipeline.usage(files, FACTS)
    assert told in text and ("metadata" in text) == bool(told)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_whose_alpha_is_not_the_rank_write_a_lora_for_web_interfaces(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    lora = config["model"]["init_args"].get("lora") or {}
    kind = config["pipeline"]["class_path"]
    if "TextToImage" in kind and lora.get("rank") != lora.get("alpha"):
        assert config["pipeline"]["init_args"]["web_lora"]


def test_a_card_leaves_the_defaults_of_diffusers_out(tmp_path: Path) -> None:
    for name in ("sd", "sdxl", "sd3", "flux_dev"):
        tiny(name).save_pretrained(tmp_path / name)
        pipeline = TextToImagePipeline(str(tmp_path / name))
        call = pipeline.family.call(pipeline.guidance_scale, None)
        assert call == {"guidance_scale": pipeline.guidance_scale}


def test_other_domains_have_a_short_card(tmp_path: Path) -> None:
    tuner = PGRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2), cut=0.5)
    assert not tuner.pipeline.hub_header([]) and not tuner.pipeline.usage([], {})
    trainer_of(default_root_dir=tmp_path).fit(tuner, MixtureData(num_train=8, batch_size=8))
    (path,) = tmp_path.rglob(f"tuned/{README}")
    text = path.read_text()
    assert text.startswith("# ") and "PGRAFT" in text and "lit-rlft predict --config" in text


def test_what_is_tested_is_what_was_exported(tmp_path: Path) -> None:
    """Of a run with an average `test` measures the average, with the callback and without it."""
    data = MixtureData(num_train=16, batch_size=8, num_test=4)

    def fresh() -> PGRAFT:
        return PGRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2), cut=0.5)

    def weights(tuner: PGRAFT) -> list[Tensor]:
        return [p.detach().clone() for p in tuner._trained().values()]

    average = EMA(0.5)
    tuner, trainer = fresh(), trainer_of(default_root_dir=tmp_path, callbacks=[average])
    saved: list[Tensor] = []

    def keep(*args: Any) -> None:
        saved.extend(weights(tuner))
        trainer.save_checkpoint(tmp_path / "file.ckpt")

    average.on_train_end = keep  # type: ignore[method-assign]
    trainer.fit(tuner, data)
    exported = weights(tuner)
    assert not any(torch.equal(raw, mean) for raw, mean in zip(saved, exported, strict=True))
    results = []
    for callbacks in ([], [EMA(0.5)]):
        again, tester = fresh(), trainer_of(default_root_dir=tmp_path, callbacks=callbacks)
        measured = tester.test(again, data, ckpt_path=str(tmp_path / "file.ckpt"), verbose=False)
        results.append(again.evaluator.means())
        assert measured is not None
    assert results[0] == results[1]
    plain = fresh()
    tester = trainer_of(default_root_dir=tmp_path)
    held = torch.load(tmp_path / "file.ckpt", weights_only=True)
    held["callbacks"] = {}
    torch.save(held, tmp_path / "raw.ckpt")
    tester.test(plain, data, ckpt_path=str(tmp_path / "raw.ckpt"), verbose=False)
    assert plain.evaluator.means() != results[0]
    # A fit goes on from the raw weights.
    resumed = trainer_of(default_root_dir=tmp_path, max_epochs=1)
    resumed.fit(last := fresh(), data, ckpt_path=str(tmp_path / "file.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(weights(last), saved, strict=True))
