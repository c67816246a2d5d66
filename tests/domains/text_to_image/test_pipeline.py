"""TextToImagePipeline beside diffusers' own StableDiffusionPipeline, on the same tiny folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.shapes import world
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.reference import LoRA, Reference, attach_lora
from tests.support import assert_close_in_rounding

Folder = Callable[..., Path]
PROMPTS = ["a red circle", "two blue rings", "a red circle"]
SEEDS = [3, 1, 4]
NUM_STEPS = 5
TOLERANCE = 1e-4


def load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: StableDiffusionPipeline, eta: float = 0.0, **call: Any) -> Tensor:
    """Pictures, or latents with output_type="latent", of diffusers' own loop."""
    call = {"prompt": PROMPTS, "num_inference_steps": NUM_STEPS, "output_type": "pt", **call}
    return pipeline(generator=generators(SEEDS), eta=eta, **call).images


@torch.no_grad()
def ours(pipeline: TextToImagePipeline, eta: float = 0.0, num_steps: int = NUM_STEPS) -> Tensor:
    """Latents of our sampler; each sample's noise comes from its own generator."""
    condition, noise = encoded(pipeline), generators(SEEDS)
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
    x_0 = Sampler(num_steps, eta).sample(pipeline, pipeline.process, x_1, condition, noise)
    assert isinstance(x_0, Tensor)
    return x_0


def encoded(pipeline: TextToImagePipeline, prompts: list[str] = PROMPTS) -> Condition:
    return pipeline.encode({"index": torch.arange(len(prompts)), "prompt": prompts})


@torch.no_grad()
def pictures(pipeline: TextToImagePipeline, **sampling: Any) -> Tensor:
    return pipeline.decode(ours(pipeline, **sampling), encoded(pipeline))


def same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() < tolerance


def close(latents: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(latents, expected, rtol=tolerance, atol=tolerance)


def noisy(pipeline: TextToImagePipeline) -> tuple[Tensor, Tensor, Condition]:
    """Return states, times on the schedule's table and conditions to predict for."""
    condition = encoded(pipeline)
    x_t = torch.randn(pipeline.blank(condition).shape, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), condition


def rewritten(folder: Path, copy: Path, part: str, **fields: Any) -> Path:
    """Copy a folder and change fields of the config of a part, or of model_index.json."""
    shutil.copytree(folder, copy)
    (path,) = (copy / part).glob("*config.json") if part else [copy / "model_index.json"]
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return copy


def with_scheduler(folder: Path, copy: Path, scheduler: Any) -> Path:
    shutil.copytree(folder, copy)
    scheduler.save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tuned(tiny_stable_diffusion: Folder) -> TextToImagePipeline:
    """A pipeline with a LoRA whose update is not zero; alpha differs from the rank."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    attach_lora(pipeline, LoRA(rank=2, alpha=6))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return pipeline


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_samples_are_those_of_diffusers(tiny_stable_diffusion: Folder, kind: str) -> None:
    """The per-sample generators are drawn from in the same order, so eta > 0 agrees as well.

    Several steps drawn at once are those drawn one by one where a state has a multiple of 16
    numbers, which latents have, or more than 2,048.
    """
    folder = tiny_stable_diffusion(prediction_type=kind, size=(16, 32))
    pipeline, plain = TextToImagePipeline(str(folder)), load(folder)
    for eta in (0.0, 0.5, 1.0):
        latents = ours(pipeline, eta=eta)
        assert latents.shape == (3, 4, 2, 4)
        close(latents, theirs(plain, eta, output_type="latent"))
        images = pictures(pipeline, eta=eta)
        assert images.shape == (3, 3, 16, 32) and images.min() >= 0 and images.max() <= 1
        assert same(images, theirs(plain, eta))


def test_guidance_is_that_of_diffusers(tiny_stable_diffusion: Folder) -> None:
    folder = tiny_stable_diffusion()
    plain, negative = load(folder), "a green square"
    pipeline = TextToImagePipeline(str(folder), guidance_scale=3.0, negative_prompt=negative)
    close(
        ours(pipeline),
        theirs(plain, output_type="latent", guidance_scale=3.0, negative_prompt=[negative] * 3),
    )
    with_negative = ours(pipeline)
    pipeline.negative_prompt = ""
    assert (ours(pipeline) - with_negative).abs().max() > 100 * TOLERANCE
    for guidance_scale in (0.5, 1.0, 1.5, 12.0):
        pipeline.guidance_scale = guidance_scale
        close(ours(pipeline), theirs(plain, output_type="latent", guidance_scale=guidance_scale))


def test_prompts_matter(tiny_stable_diffusion: Folder) -> None:
    """The comparisons above would see an exchanged prompt."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    x_t, t, condition = noisy(pipeline)
    mixed = encoded(pipeline, [PROMPTS[1], PROMPTS[0], PROMPTS[0]])
    with torch.no_grad():
        changed = (pipeline(x_t, t, mixed) - pipeline(x_t, t, condition)).abs().amax((1, 2, 3))
    assert (changed[:2] > 100 * TOLERANCE).all() and changed[2] < TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_grids_are_those_of_diffusers(
    tiny_stable_diffusion: Folder, spacing: str, ends_at_zero: bool
) -> None:
    """With "linspace" too, where diffusers' DDIM takes steps that miss its own grid."""
    scheduler = {"timestep_spacing": spacing, "set_alpha_to_one": ends_at_zero}
    folder = tiny_stable_diffusion(prediction_type="v_prediction", scheduler=scheduler)
    latents = ours(TextToImagePipeline(str(folder)))
    close(latents, theirs(load(folder), output_type="latent"))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_folders_are_sampled_as_diffusers_samples_them(
    tiny_stable_diffusion: Folder, tmp_path: Path, spacing: str
) -> None:
    """As SD-Turbo's: DDIM's leftover key is ignored, and x_T has Euler's scale."""
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing=spacing
    )
    folder = with_scheduler(tiny_stable_diffusion(), tmp_path / "euler", euler)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "set_alpha_to_one": False}))
    pipeline, plain = TextToImagePipeline(str(folder)), load(folder)
    assert plain.scheduler.config["set_alpha_to_one"] is False
    condition = encoded(pipeline)
    z = torch.randn(pipeline.blank(condition).shape)
    x_1 = pipeline.process.prior(z).std * z
    with torch.no_grad():
        latents = Sampler(4).sample(pipeline, pipeline.process, x_1, condition)
    expected = plain(
        PROMPTS, latents=z, num_inference_steps=4, guidance_scale=7.5, output_type="latent"
    ).images
    assert isinstance(latents, Tensor)
    close(latents, expected)


def test_missing_keys_have_the_defaults_of_the_class(
    tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    """A DPM++ folder without timestep_spacing is spaced by "linspace", and starts below T."""
    folder = with_scheduler(
        tiny_stable_diffusion(), tmp_path / "dpm", DPMSolverMultistepScheduler()
    )
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler"}))
    schedule = TextToImagePipeline(str(folder)).process.schedule
    plain = load(folder).scheduler
    plain.set_timesteps(7)
    told: Any = schedule
    assert torch.equal(told.timestep(schedule.times(7)[:-1]), plain.timesteps)


def test_zero_terminal_snr(tiny_stable_diffusion: Folder) -> None:
    scheduler = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = tiny_stable_diffusion(prediction_type="v_prediction", scheduler=scheduler)
    latents = ours(TextToImagePipeline(str(folder)))
    close(latents, theirs(load(folder), output_type="latent"))
    blind = tiny_stable_diffusion(prediction_type="epsilon", scheduler=scheduler)
    with pytest.raises(UsageError, match="pure noise"):
        TextToImagePipeline(str(blind))


@pytest.mark.parametrize(("height", "width"), [(32, None), (None, 8), (24, 40)])
def test_pictures_of_another_size(
    tiny_stable_diffusion: Folder, height: int | None, width: int | None
) -> None:
    folder = tiny_stable_diffusion(size=(16, 32))
    pipeline = TextToImagePipeline(str(folder), height=height, width=width)
    call = {"height": height or 16, "width": width or 32}
    images = pictures(pipeline)
    assert images.shape[2:] == tuple(call.values())
    assert same(images, theirs(load(folder), **call))


@pytest.mark.parametrize("key", ["height", "width"])
@pytest.mark.parametrize("pixels", [20, 0, -8])
def test_a_size_between_latents_is_refused(
    tiny_stable_diffusion: Folder, key: str, pixels: int
) -> None:
    with pytest.raises(UsageError, match=rf"{key} is {pixels}, .* multiple of 8"):
        TextToImagePipeline(str(tiny_stable_diffusion()), **{key: pixels})


def test_size_of_latents_follows_the_autoencoder(tiny_stable_diffusion: Folder) -> None:
    folder = tiny_stable_diffusion(size=(16, 32), factor=4)
    pipeline = TextToImagePipeline(str(folder))
    assert pipeline.latent_size == (4, 8)
    assert same(pictures(pipeline), theirs(load(folder)))
    assert TextToImagePipeline(str(folder), height=20).latent_size == (5, 8)


def test_one_prompt_with_different_records_is_encoded_once_and_stays_apart() -> None:
    pipeline = TextToImagePipeline()
    prompts = ["a red ring", "a blue square", "a red ring", "a red ring"]
    batch = {"prompt": prompts, "category": ["color", "shape", "numeracy", "color"]}
    condition = pipeline.encode(batch)
    assert condition.rows.tolist() == [0, 1, 2, 0] and condition.null == 3
    assert [record["category"] for record in condition.each()] == batch["category"]
    plain = pipeline.encode({"prompt": prompts})
    assert plain.rows.tolist() == [0, 1, 0, 0]
    for name, table in condition.tables.items():
        assert table.equal(plain.tables[name][[0, 1, 0, 2]])


def test_unique_prompts_are_encoded_once(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), negative_prompt="no")
    calls: list[int] = []
    pipeline.encoder.register_forward_hook(
        lambda module, args, output: calls.append(len(output[0]))
    )
    prompts = ["b", "a", "b", "b", "a", "c"]
    condition = encoded(pipeline, prompts)
    assert calls == [4]
    assert condition.each() == [{"prompt": prompt} for prompt in prompts]
    assert condition.rows.tolist() == [0, 1, 0, 0, 1, 2] and condition.null == 3
    table = condition.table("embedding")
    assert torch.equal(table[0], table[2]) and not torch.equal(table[0], table[1])
    alone, _ = pipeline.diffusers.encode_prompt(["no"], "cpu", 1, False)
    torch.testing.assert_close(condition.tables["embedding"][-1:], alone)
    dropped = condition.dropped(torch.tensor([False, True, *[False] * 4]))
    torch.testing.assert_close(dropped.table("embedding")[1:2], alone)


def test_prompts_are_encoded_in_chunks(tiny_stable_diffusion: Folder) -> None:
    folder = str(tiny_stable_diffusion())
    pipeline = TextToImagePipeline(folder, encode_batch_size=2)
    sizes: list[int] = []
    pipeline.encoder.register_forward_hook(lambda m, args, output: sizes.append(len(output[0])))
    prompts = ["a", "b", "c", "d", "a"]
    table = encoded(pipeline, prompts).tables["embedding"]
    assert sizes == [2, 2, 1]
    whole = TextToImagePipeline(folder)
    torch.testing.assert_close(table, encoded(whole, prompts).tables["embedding"])
    with pytest.raises(UsageError, match="encode_batch_size must be at least 1"):
        TextToImagePipeline(folder, encode_batch_size=0)


def test_work_on_prompts_grows_with_their_number(
    tiny_stable_diffusion: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are compared a few times each, not each with each other."""
    compared = 0

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    nothing = {"embedding": torch.zeros(10_001, 1, 1)}
    monkeypatch.setattr(pipeline.family, "encode", lambda prompts: nothing)
    prompts: list[str] = [Counted(f"prompt {i // 2}") for i in range(20_000)]
    condition = encoded(pipeline, prompts)
    assert condition.rows.tolist() == [i // 2 for i in range(20_000)]
    assert compared < 10 * len(prompts)


def test_columns_travel_with_their_prompts(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    batch = {"index": torch.arange(3), "prompt": ["b", "a", "b"], "tag": ["x", "y", "x"]}
    entries = pipeline.encode(batch).each()
    assert entries[0] == entries[2] == {"prompt": "b", "tag": "x"}
    assert entries[1] == {"prompt": "a", "tag": "y"}


def test_long_prompts_are_cut_off(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    long = " ".join(["circle"] * 40)
    table = encoded(pipeline, [long, long + " ring"]).table("embedding")
    assert_close_in_rounding(table[0], table[1])


def test_guided_prediction_is_the_formula_in_one_call(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=4.0)
    x_t, t, condition = noisy(pipeline)
    rows: list[int] = []
    pipeline.denoiser.register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    with torch.no_grad():
        guided = pipeline(x_t, t, condition)
        assert rows == [6]
        c = pipeline.predict(x_t, t, condition)
        u = pipeline.predict(x_t, t, condition.dropped(torch.ones(3, dtype=torch.bool)))
        torch.testing.assert_close(guided, u + 4.0 * (c - u))
        rows.clear()
        pipeline.guidance_scale = 1.0
        assert torch.equal(pipeline(x_t, t, condition), c) and rows == [3]


def test_the_network_sees_the_timestep_it_was_trained_with(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=1.0)
    x_t, t, condition = noisy(pipeline)
    with torch.no_grad():
        timesteps = torch.tensor([99, 499, 999])
        expected = pipeline.denoiser(x_t, timesteps, condition.table("embedding")).sample
        assert torch.equal(pipeline.predict(x_t, t, condition), expected)


def test_gradients_reach_the_denoiser_and_nothing_else(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    pipeline(*noisy(pipeline)).sum().backward()
    assert all(p.grad is not None for p in pipeline.denoiser.parameters())
    frozen = [*pipeline.encoder.parameters(), *pipeline.vae.parameters()]
    assert not any(p.requires_grad for p in frozen)


def test_weights_stored_in_half_precision_run_in_single(
    tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    load(tiny_stable_diffusion()).to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    pipeline = TextToImagePipeline(str(tmp_path / "half"))
    assert {p.dtype for p in pipeline.parameters()} == {torch.float32}
    weight = pipeline.denoiser.conv_in.weight
    assert torch.equal(weight, weight.half().float())
    images = pictures(pipeline)
    assert images.dtype == torch.float32
    assert same(images, theirs(load(tmp_path / "half").to(dtype=torch.float32)))


def test_from_scratch_keeps_the_architecture_and_the_autoencoder(
    tiny_stable_diffusion: Folder,
) -> None:
    folder = str(tiny_stable_diffusion())
    torch.manual_seed(1)  # the folder's own weights come from seed 0
    old, new = TextToImagePipeline(folder), TextToImagePipeline(folder, from_scratch=True)
    for part, kept in (("denoiser", False), ("encoder", False), ("vae", True)):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (old, new))
        assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
        assert all(torch.equal(before[name], after[name]) for name in before) == kept


def test_decoding_in_chunks(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), decode_batch_size=2)
    sizes: list[int] = []
    pipeline.vae.decoder.register_forward_hook(lambda m, args, output: sizes.append(len(output)))
    x_0 = torch.randn(5, 4, 2, 2)
    condition = encoded(pipeline, ["a"] * 5)
    with torch.no_grad():
        images = pipeline.decode(x_0, condition)
        assert sizes == [2, 2, 1]
        pipeline.decode_batch_size = 5
        torch.testing.assert_close(images, pipeline.decode(x_0, condition))


def test_decoding_goes_on_with_fewer_pictures_where_memory_runs_out(
    tiny_stable_diffusion: Folder,
) -> None:
    """The default; what was decoded before stays, and encoding pictures shares the number."""
    folder = str(tiny_stable_diffusion())
    pipeline, fixed = TextToImagePipeline(folder), TextToImagePipeline(folder, decode_batch_size=2)
    sizes: list[int] = []

    def bounded(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for part in (pipeline.vae.decoder, pipeline.vae.encoder):
        part.register_forward_pre_hook(bounded)
    x_0, condition = torch.randn(5, 4, 2, 2), encoded(fixed, ["a"] * 5)
    with torch.no_grad():
        assert torch.equal(pipeline.decode(x_0, condition), fixed.decode(x_0, condition))
        assert sizes == [5, 4, 2, 2, 1]
    batch = {"image": torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)}
    assert torch.equal(tensor_of(pipeline.states(batch)), tensor_of(fixed.states(batch)))
    assert sizes[5:] == [2, 2, 1]
    rows = {key: size.rows for key, size in pipeline.batch_sizes().items()}
    key = "pipeline.decode_batch_size"
    assert rows == {key: 2, f"{key} with gradients": 32}


def test_states_of_pictures_invert_decoding(tiny_stable_diffusion: Folder) -> None:
    """Scaling, range and chunks, with a lossless stand-in for the autoencoder."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), decode_batch_size=2)
    image = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    x_0 = pipeline.states({"image": image})
    assert isinstance(x_0, Tensor) and x_0.shape == (5, 4, 2, 2) and not x_0.requires_grad
    with torch.no_grad():
        law = pipeline.vae.encode(image / 127.5 - 1).latent_dist
        torch.testing.assert_close(x_0, law.mean * pipeline.vae.config["scaling_factor"])

    class Lossless(torch.nn.Module):
        dtype, config = torch.float32, pipeline.vae.config

        def encode(self, x: Tensor) -> SimpleNamespace:
            law = SimpleNamespace(mode=lambda: torch.cat([x, x[:, :1]], dim=1))
            return SimpleNamespace(latent_dist=law)

        def decode(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=x[:, :3])

    pipeline.vae = Lossless()  # type: ignore[assignment]
    back = pipeline.decode(pipeline.states({"image": image}), encoded(pipeline, ["a"] * 5))
    torch.testing.assert_close(back, image / 255, rtol=0, atol=1e-6)


def test_the_embedded_autoencoder_returns_its_pictures() -> None:
    """Up to the autoencoder's own error: a mean absolute error of 1 % on the shapes world."""
    pipeline = TextToImagePipeline("shapes", decode_batch_size=8)
    rng = np.random.default_rng(0)
    arrays = [world.sample(rng, world.split_prompts("val"))[1] for _ in range(16)]
    image = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = pipeline.states({"image": image})
        back = pipeline.decode(states, Condition([{}], {}, torch.zeros(16, dtype=torch.int64)))
    assert isinstance(states, Tensor) and 0.5 < states.std() < 2
    assert (back - image / 255).abs().mean() < 0.01


def test_lora_is_read_by_diffusers(
    tuned: TextToImagePipeline, tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    tuned.guidance_scale = 3.0
    paths = tuned.save(tmp_path / "lora")
    assert [path.name for path in paths] == ["pytorch_lora_weights.safetensors"]
    plain = load(tiny_stable_diffusion())
    before = theirs(plain, guidance_scale=3.0, output_type="latent")
    plain.load_lora_weights(tmp_path / "lora")
    after = theirs(plain, guidance_scale=3.0, output_type="latent")
    assert (after - before).abs().max() > 0.1
    close(ours(tuned), after, 1e-3)
    assert same(pictures(tuned), theirs(plain, guidance_scale=3.0), 1e-3)


@pytest.mark.parametrize("place", ["", "pytorch_lora_weights.safetensors"])
def test_a_saved_lora_is_read_back(
    tuned: TextToImagePipeline, tiny_stable_diffusion: Folder, tmp_path: Path, place: str
) -> None:
    tuned.save(tmp_path)
    again = TextToImagePipeline(str(tiny_stable_diffusion()))
    attach_lora(again, LoRA(2, 6, pretrained=str(tmp_path / place)))
    saved, read = tuned.denoiser.state_dict(), again.denoiser.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(read[name], value) for name, value in saved.items())
    trained = [name for name, p in again.denoiser.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)


def test_a_lora_of_other_tools_means_what_it_means_to_diffusers(
    tuned: TextToImagePipeline, tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    """Without metadata its alpha is its rank, whatever it was trained with."""
    (path,) = tuned.save(tmp_path)
    save_file(load_file(path), path)
    again = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    attach_lora(again, LoRA(2, 2, pretrained=str(path)))
    plain = load(tiny_stable_diffusion())
    plain.load_lora_weights(path)
    close(ours(again), theirs(plain, guidance_scale=3.0, output_type="latent"))


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 4}, "has rank 2, not 4; set model.init_args.lora.rank to the file's"),
    "alpha": ({"alpha": 2}, "has alpha 6, not 2; set model.init_args.lora.alpha to the file's"),
    "targets": ({"targets": ["to_q"]}, r"other layers .*, such as .*; set .*lora\.targets"),
    "nowhere": ({"pretrained": "nowhere"}, "lora.pretrained: there is no file nowhere"),
    "hub id": ({"pretrained": "me/style"}, "no file me/style; if it is a hub id, `hf download me/"),
    "moved": ({"pretrained": "empty/style"}, "there is no file empty/style$"),
    "empty folder": ({"pretrained": "empty"}, "there is no file empty/pytorch_lora_weights"),
    "no safetensors": ({"pretrained": "broken"}, "broken is no safetensors file"),
    "other tensors": ({"pretrained": "foreign"}, "foreign is no LoRA in diffusers' format"),
    "other scale": ({"pretrained": "rslora"}, "rslora was trained with use_rslora"),
}


@pytest.mark.parametrize("mistake", MISFITS)
def test_loras_that_do_not_fit_are_refused(
    tuned: TextToImagePipeline,
    tiny_stable_diffusion: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = tuned.save(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").write_text("nothing")
    save_file({"weight": torch.zeros(1)}, "foreign")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}
    save_file(load_file(path), "rslora", metadata)
    changes, sentence = MISFITS[mistake]
    lora = LoRA(**{"rank": 2, "alpha": 6, "pretrained": str(path), **changes})
    with pytest.raises(UsageError, match=sentence):
        attach_lora(TextToImagePipeline(str(tiny_stable_diffusion())), lora)


def test_a_lora_of_a_larger_model_is_refused(
    tuned: TextToImagePipeline, tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    (path,) = tuned.save(tmp_path)
    lora = LoRA(2, 6, pretrained=str(path))
    with pytest.raises(UsageError, match="has layers of other sizes than this model"):
        attach_lora(TextToImagePipeline(str(tiny_stable_diffusion(width=16))), lora)


def test_a_fully_tuned_pipeline_is_a_folder_like_its_own(
    tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    with torch.no_grad():
        for parameter in pipeline.denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    assert pipeline.save(tmp_path / "whole") == [tmp_path / "whole"]
    images = pictures(pipeline)
    assert_close_in_rounding(pictures(TextToImagePipeline(str(tmp_path / "whole"))), images)
    assert same(theirs(load(tmp_path / "whole")), images)
    assert not same(theirs(load(tiny_stable_diffusion())), images, 1e-2)


@pytest.mark.parametrize("save_dtype", ["float16", "bfloat16"])
def test_saving_in_another_precision_leaves_the_model_alone(
    tiny_stable_diffusion: Folder, tmp_path: Path, save_dtype: Any
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), save_dtype=save_dtype)
    before = pictures(pipeline)
    pipeline.save(tmp_path)
    assert torch.equal(pictures(pipeline), before) and pipeline.diffusers.unet is pipeline.denoiser
    stored = load(tmp_path).unet.conv_in.weight
    weight = pipeline.denoiser.conv_in.weight
    assert torch.equal(stored.float(), weight.to(getattr(torch, save_dtype)).float())


def test_disabled_adapter_is_the_pretrained_model(
    tuned: TextToImagePipeline, tiny_stable_diffusion: Folder
) -> None:
    reference = Reference(tuned, adapted=True)
    assert not list(reference.parameters())
    x_t, t, condition = noisy(tuned)
    base = TextToImagePipeline(str(tiny_stable_diffusion()))
    with torch.no_grad():
        policy, pretrained = tuned(x_t, t, condition), base(x_t, t, condition)
        with reference.active():
            assert_close_in_rounding(tuned(x_t, t, condition), pretrained)
        assert torch.equal(tuned(x_t, t, condition), policy)
        assert (policy - pretrained).abs().max() > 0.01
        with pytest.raises(RuntimeError, match="in the middle"), reference.active():
            raise RuntimeError("in the middle")
        assert torch.equal(tuned(x_t, t, condition), policy)
    trained = [name for name, p in tuned.denoiser.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_frozen_copy_is_the_pretrained_model(tiny_stable_diffusion: Folder) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    reference = Reference(pipeline, adapted=False)
    x_t, t, condition = noisy(pipeline)
    with torch.no_grad():
        pretrained = pipeline(x_t, t, condition)
        for parameter in pipeline.denoiser.parameters():
            parameter.add_(0.1)
        policy, network = pipeline(x_t, t, condition), pipeline.denoiser
        with pytest.raises(RuntimeError), reference.active():
            # A copy's weights lie elsewhere in memory, which may change the order of a sum.
            torch.testing.assert_close(pipeline(x_t, t, condition), pretrained)
            raise RuntimeError
        assert pipeline.denoiser is network and not torch.equal(policy, pretrained)
    assert not any(p.requires_grad for p in reference.parameters())


def test_stable_diffusions_own_scheduler_settings(
    tiny_stable_diffusion: Folder, tmp_path: Path
) -> None:
    """SD 1.5 comes with PNDM: its noise levels are kept, DDIM walks them."""
    pndm = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    folder = with_scheduler(tiny_stable_diffusion(), tmp_path / "pndm", pndm)
    plain = load(folder)
    assert isinstance(plain.scheduler, PNDMScheduler)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    close(ours(TextToImagePipeline(str(folder))), theirs(plain, output_type="latent"))


@pytest.mark.parametrize("kind", ["flow_prediction", "made_up"])
def test_unknown_predictions_are_refused(
    tiny_stable_diffusion: Folder, tmp_path: Path, kind: str
) -> None:
    folder = rewritten(tiny_stable_diffusion(), tmp_path / "x", "scheduler", prediction_type=kind)
    with pytest.raises(UsageError, match=f"DDIMScheduler.*{kind}.*epsilon") as caught:
        TextToImagePipeline(str(folder))
    assert "\n" not in str(caught.value)


def test_flow_schedulers_are_refused(tiny_stable_diffusion: Folder, tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    folder = with_scheduler(tiny_stable_diffusion(), tmp_path / "flow", scheduler)
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler") as caught:
        TextToImagePipeline(str(folder))
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_pipeline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model_index"):
        TextToImagePipeline(str(tmp_path))
    with pytest.raises(UsageError, match="could not be loaded"):
        TextToImagePipeline(str(tmp_path / "nowhere"))


def test_saved_samples_are_the_pictures(tiny_stable_diffusion: Folder, tmp_path: Path) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    images = torch.rand(2, 3, 16, 16)
    paths = pipeline.save_samples(images, encoded(pipeline, ["a", "b"]), tmp_path, ["x", "y"])
    assert [path.name for path in paths] == ["x.png", "y.png"]
    for image, path in zip(images, paths, strict=True):
        stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert torch.equal(stored, (image * 255).round().byte())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile": "all"}, "compile is 'all'; use 'blocks', 'whole' or None"),
        ({"offload": ["unet"]}, "offload is 'unet'; use 'vae'"),
        ({"guidance_gradient": "half"}, "guidance_gradient is 'half'; use 'both'"),
        ({"text_encoders": "gpu"}, "text_encoders is 'gpu'; use 'keep'"),
        ({"text_encoders": "cpu", "from_scratch": True}, "text_encoders must be 'keep' with"),
        ({"text_encoders": "drop", "from_scratch": True}, "text_encoders must be 'keep' with"),
        ({"text_encoders": "drop"}, "'keep' or 'cpu' without pipeline.embedding_cache"),
        ({"embedding_cache": "c", "from_scratch": True}, "embedding_cache must be null with"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        TextToImagePipeline("no/such-model", **settings)
