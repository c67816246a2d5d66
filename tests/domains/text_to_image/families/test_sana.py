"""What Sana alone has: an instruction before prompts, flows of solvers, no posterior."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline
from torch import Tensor

from domains.text_to_image.families import FAMILIES, Family
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.flow_schedulers import flow_process
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.families.tiny import tiny

SLOW = pytest.mark.slow
SIZE = {"height": 32, "width": 64}
PROMPTS = ["a red ring", " A Blue square, BELOW ", "", "word " * 70]
SOLVERS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sana"
    tiny("sana").save_pretrained(path)
    return path


def family_of(parts: Any, **options: Any) -> Family:
    return FAMILIES["SanaPipeline"](parts, (32, 64), **options)


@pytest.mark.parametrize("length", [pytest.param(300, marks=SLOW), 40])
def test_encodings_are_those_of_diffusers(length: int) -> None:
    """Prompts after the instruction, the negative prompt without it, zeros where there is none."""
    family = family_of(tiny("sana"), **({} if length == 300 else {"max_sequence_length": length}))
    call = inspect.signature(SanaPipeline.__call__).parameters
    told = call["complex_human_instruction"].default
    assert told[-1] == "User Prompt: "
    embedding, mask, negative, negative_mask = family.parts.encode_prompt(
        list(PROMPTS),
        negative_prompt="a Dull one",
        complex_human_instruction=told,
        max_sequence_length=length,
    )
    assert int(mask[0].sum()) < length == int(mask[3].sum())
    rows = family.tables(PROMPTS, "a Dull one")["embedding"]
    assert tuple(rows.shape[1:]) == family.encoded_shapes()["embedding"] == (length, 9)
    theirs = torch.cat([embedding, negative[:1]])
    marks = torch.cat([mask, negative_mask[:1]])
    torch.testing.assert_close(rows[..., -1], marks.float())
    torch.testing.assert_close(rows[..., :-1], theirs * marks.unsqueeze(-1), atol=1e-6, rtol=1e-5)
    empty = family.tables([""], None)["embedding"]  # the same text, read in both ways
    assert not torch.equal(empty[0], empty[1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance", "negative"),
    [(3.5, "dull"), pytest.param(1.0, None, marks=SLOW), pytest.param(3.5, None, marks=SLOW)],
)
def test_pictures_are_those_of_diffusers(
    folder: Path, guidance: float, negative: str | None
) -> None:
    pipeline = TextToImagePipeline(
        str(folder), guidance_scale=guidance, negative_prompt=negative, **SIZE
    )
    condition = pipeline.encode({"prompt": PROMPTS})
    shape = pipeline.blank(condition).shape
    z = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x = Sampler(num_steps=3).sample(pipeline, pipeline.process, z, condition)
    pictures = pipeline.decode(x, condition)
    expected = SanaPipeline.from_pretrained(folder)(
        PROMPTS,
        negative_prompt=negative or "",
        guidance_scale=guidance,
        num_inference_steps=3,
        latents=z,
        output_type="pt",
        use_resolution_binning=False,
        **SIZE,
    ).images
    assert float(expected.std()) > 0.02
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_pictures_become_latents_without_a_posterior(folder: Path) -> None:
    pipeline = TextToImagePipeline(str(folder), tile_decoder=True, **SIZE)
    pipeline.check_states()
    pictures = torch.randint(
        256, (3, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    states = pipeline.states({"image": pictures})
    vae = AutoencoderDC.from_pretrained(folder, subfolder="vae")
    expected = vae.encode(pictures / 127.5 - 1).latent * 0.41407
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_of_a_flow_gives_its_levels_and_timesteps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_rlft.kit.flow_schedulers.rank_zero_info", said.append)
    scheduler = getattr(diffusers, name)(**FLOW)
    schedule: Any = flow_process(scheduler, "Sana", None, own_grid=True).schedule
    (line,) = said
    assert line.startswith(f"the model's {name} is a solver") and "Euler steps" in line
    for num_steps in (1, 2, 7, 20):
        times = schedule.times(num_steps)
        scheduler.set_timesteps(num_steps)
        assert torch.equal(times.float(), scheduler.sigmas)
        assert torch.equal(schedule.timestep(times[:-1]).long(), scheduler.timesteps)
    uniform = torch.tensor([0.5])  # noise levels of training are shifted as well
    assert float(schedule.draw_times(uniform)) == pytest.approx(1.5 / 2)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (SOLVERS[0], {"prediction_type": "epsilon"}, "prediction_type .*'flow_prediction'"),
        (SOLVERS[1], {"final_sigmas_type": "sigma_min"}, "final_sigmas_type .*'zero'"),
        (SOLVERS[2], {"shift_terminal": 0.1}, "shift_terminal .*null"),
        (SOLVERS[0], {"use_karras_sigmas": True}, "use_karras_sigmas .*false"),
        (SOLVERS[0], {"thresholding": True}, "thresholding .*false"),
        (SOLVERS[2], {"use_dynamic_shifting": True}, "use_dynamic_shifting .*a number"),
        (SOLVERS[0], {"use_flow_sigmas": False}, "put a FlowMatchEulerDiscreteScheduler"),
        ("DEISMultistepScheduler", {}, "put a FlowMatchEulerDiscreteScheduler"),
    ],
    ids=str,
)
def test_what_a_solver_would_do_otherwise_is_refused(
    name: str, options: dict[str, Any], said: str
) -> None:
    scheduler = getattr(diffusers, name)(**{**FLOW, **options})
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.pretrained: .*{said}"):
        flow_process(scheduler, "Sana", None, own_grid=True)


def test_half_precision_is_refused_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "sana"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UsageError, match=r"init_args\.frozen_dtype is float16.*to bfloat16"):
        TextToImagePipeline(str(path), frozen_dtype="float16", **SIZE)


def changed(change: str) -> SanaPipeline:
    """Return a model that is not supported."""
    parts: Any = tiny("sana")
    if change == "VAE":
        parts.vae = tiny("sd").vae
    elif change == "Sprint":
        parts.transformer.register_to_config(guidance_embeds=True)
    elif change == "width":
        parts.transformer.register_to_config(caption_channels=12)
    elif change == "vocabulary":
        parts.tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    return parts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("VAE", "is a AutoencoderKL, not an AutoencoderDC"),
        ("Sprint", "as SANA-Sprint's is"),
        ("width", "text features of 12 numbers, its text encoder makes 8"),
        ("vocabulary", "they must be of one model"),
    ],
)
def test_models_that_do_not_fit_are_refused(change: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.pretrained: .*{said}"):
        family_of(changed(change))


@pytest.mark.parametrize("tokenizer", [pytest.param(True, marks=SLOW), False])
def test_without_weights_there_are_shapes(folder: Path, tmp_path: Path, tokenizer: bool) -> None:
    path = tmp_path / "sana"
    left_out = ["*.safetensors", *([] if tokenizer else ["tokenizer"])]
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns(*left_out))
    with without_weights():
        pipeline = TextToImagePipeline(str(path), **SIZE)
        condition = pipeline.encode({"prompt": PROMPTS})
        x = pipeline.blank(condition).to("meta")
        prediction = pipeline(x, torch.full((len(x),), 0.5, device="meta"), condition)
    assert prediction.is_meta and prediction.shape == x.shape


def test_encodings_on_disk_tell_prompts_from_negative_prompts(folder: Path, tmp_path: Path) -> None:
    tables: list[Tensor] = []
    for _ in range(2):
        pipeline = TextToImagePipeline(
            str(folder), negative_prompt="a ring", embedding_cache=str(tmp_path / "c"), **SIZE
        )
        tables.append(pipeline.encode({"prompt": ["a ring"]}).tables["embedding"])
    assert torch.equal(*tables) and not torch.equal(tables[0][0], tables[0][1])


def test_another_vae_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    other = tiny("sana", seed=5).vae
    other.save_pretrained(tmp_path / "vae")
    pipeline = TextToImagePipeline(str(folder), vae=str(tmp_path / "vae"), **SIZE)
    assert torch.equal(next(pipeline.vae.parameters()), next(other.parameters()))
    file = str(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    of_file = TextToImagePipeline(str(folder), vae=file, **SIZE)
    assert torch.equal(next(of_file.vae.parameters()), next(other.parameters()))
    tiny("sd").vae.save_pretrained(tmp_path / "kl")
    with pytest.raises(UsageError, match=r"^pipeline\.init_args\.vae: .* not an AutoencoderDC"):
        TextToImagePipeline(str(folder), vae=str(tmp_path / "kl"), **SIZE)
    model = tmp_path / "sd"
    tiny("sd").save_pretrained(model)
    with pytest.raises(
        UsageError, match=r"^pipeline\.init_args\.vae: .* is of class AutoencoderDC, not"
    ):
        TextToImagePipeline(str(model), vae=str(tmp_path / "vae"))
