"""Each family beside its own pipeline in diffusers: same scheduler, steps, guidance and latents."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from domains.text_to_image.families import FAMILIES, Family
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from tests.domains.text_to_image.families.tiny import tiny

PROMPTS = ["a red ring", "a blue square below"]


def family_of(name: str, size: tuple[int | None, int | None], **options: Any) -> Family:
    """Return a tiny model's family."""
    parts = tiny(name)
    return FAMILIES[type(parts).__name__](parts, size, **options)


def packed(latents: Tensor) -> Tensor:
    """Return FLUX's tokens, by its own pipeline's function."""
    from diffusers import FluxPipeline

    size, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, size, channels, height, width)


def ours(family: Family, guidance: float, num_steps: int, negative: str | None = None) -> Tensor:
    """Sample latents of the prompts."""
    encoded = family.tables(PROMPTS, negative)
    tables = {name: table[:-1] for name, table in encoded.items()}
    nothing = {name: table[[-1] * len(PROMPTS)] for name, table in encoded.items()}

    def denoiser(x: Tensor, t: Tensor, condition: object) -> Tensor:
        w = family.cfg_scale(guidance)
        c = family.denoise(family.denoiser, x, t, tables, guidance)
        return (
            c
            if w <= 1
            else (1 - w) * family.denoise(family.denoiser, x, t, nothing, guidance) + w * c
        )

    with torch.no_grad():
        return Sampler(num_steps=num_steps).sample(denoiser, family.process, start(family), [0, 1])


def start(family: Family) -> Tensor:
    """Return the initial noise."""
    shape = (len(PROMPTS), family.channels, *family.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def theirs(family: Family, num_steps: int, **settings: Any) -> Tensor:
    """Return the latents of the family's own pipeline, packed as it packs them."""
    z = start(family)
    height, width = family.pixels
    return family.parts(
        prompt=list(PROMPTS),  # Z-Image writes into the list
        height=height,
        width=width,
        latents=packed(z) if family.name == "FLUX.1" else z.clone(),
        num_inference_steps=num_steps,
        output_type="latent",
        **settings,
    ).images


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("sdxl", (24, 16), {"guidance_scale": 3.5}),
        ("sdxl", (16, 16), {"guidance_scale": 1.0}),
        ("sd3", (32, 48), {"guidance_scale": 3.5}),
        ("flux_dev", (32, 48), {"guidance_scale": 3.5, "max_sequence_length": 512}),
        ("flux_schnell", (32, 32), {"guidance_scale": 0.0, "max_sequence_length": 256}),
        ("zimage", (32, 48), {"guidance_scale": 3.5}),
        pytest.param(
            "sana",
            (32, 64),
            {"guidance_scale": 3.5, "use_resolution_binning": False},
            marks=pytest.mark.slow,
        ),
        pytest.param("zimage", (32, 32), {"guidance_scale": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_latents_are_those_of_diffusers(
    name: str, size: tuple[int, int], settings: dict[str, Any], num_steps: int
) -> None:
    family = family_of(name, size)
    expected = theirs(family, num_steps, **settings)
    latents = ours(family, settings["guidance_scale"], num_steps)
    if name.startswith("flux"):
        latents = packed(latents)
    torch.testing.assert_close(latents, expected, atol=5e-5, rtol=1e-5)


def test_flux_guides_classifier_free_beside_its_own_guidance() -> None:
    family = family_of("flux_dev", (32, 32), true_cfg_scale=2.5)
    expected = theirs(
        family, 4, guidance_scale=3.5, true_cfg_scale=2.5, negative_prompt=["dull"] * 2
    )
    torch.testing.assert_close(packed(ours(family, 3.5, 4, "dull")), expected, atol=5e-5, rtol=1e-5)


def test_flux_refuses_guidance_away_from_nothing() -> None:
    """Where diffusers does not guide at all."""
    family = family_of("flux_dev", (32, 32), true_cfg_scale=2.5)
    sentence = r"true_cfg_scale above 1 needs a pipeline.init_args.negative_prompt .*'\"\"' for an"
    with pytest.raises(UsageError, match=sentence):
        family.check_guidance(3.5, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for negative in ("", "dull"):
            family.check_guidance(3.5, negative)
        for name, guidance in (("sd", 1.0), ("zimage", 0.0), ("flux_dev", 3.5)):
            family_of(name, (32, 32)).check_guidance(guidance, None)


@pytest.mark.parametrize(
    ("name", "guidance", "remedy"),
    [
        ("sd", 1.0, "guidance_scale above 1"),
        ("zimage", 0.0, "guidance_scale above 0"),
        ("flux_dev", 3.5, "true_cfg_scale above 1"),
    ],
)
def test_a_negative_prompt_without_guidance_is_told_once(
    name: str, guidance: float, remedy: str, tmp_path: Path
) -> None:
    tiny(name).save_pretrained(tmp_path)
    given = {"guidance_scale": guidance, "negative_prompt": "dull", "height": 32, "width": 32}
    with pytest.warns(UserWarning, match=f"guidance is off; set .*{remedy}, or leave") as told:
        TextToImagePipeline(str(tmp_path), **given)
    assert sum("negative_prompt" in str(each.message) for each in told) == 1


@pytest.mark.parametrize("name", ["sdxl", "sdxl_turbo"])
def test_no_negative_prompt_is_what_sdxl_takes_for_none(name: str) -> None:
    family = family_of(name, (16, 16))
    _, embedding, _, pooled = family.parts.encode_prompt("a ring", negative_prompt=None)
    null = {key: table[-1:] for key, table in family.tables(["a ring"], None).items()}
    torch.testing.assert_close(null["embedding"], embedding)
    torch.testing.assert_close(null["pooled"], pooled)
    assert bool((null["pooled"] == 0).all()) == (name == "sdxl")
    assert not bool((family.tables([], "")["pooled"] == 0).all())


def test_sdxl_is_told_sizes_and_crop() -> None:
    family = family_of("sdxl", (16, 16), original_size=(32, 24), crop=(2, 1))
    expected = theirs(
        family,
        3,
        guidance_scale=2.0,
        original_size=(32, 24),
        crops_coords_top_left=(2, 1),
        negative_original_size=(32, 24),
        negative_crops_coords_top_left=(2, 1),
        negative_target_size=(16, 16),
    )
    torch.testing.assert_close(ours(family, 2.0, 3), expected, atol=5e-5, rtol=1e-5)
    assert (ours(family_of("sdxl", (16, 16)), 2.0, 3) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["sdxl", "sd3", "flux_dev", "zimage", pytest.param("sana", marks=pytest.mark.slow)],
)
def test_pictures_and_latents_in_the_units_of_the_vae(name: str) -> None:
    family = family_of(name, (32, 32))
    if name == "sdxl":
        family.parts.vae.register_to_config(
            latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]
        )
    latents = start(family)
    torch.testing.assert_close(family.from_vae(family.to_vae(latents)), latents)
    guidance = 0.0 if name == "zimage" else 1.0
    settings: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 1,
        "guidance_scale": guidance,
    }
    if name == "sana":
        settings["use_resolution_binning"] = False
    given = packed(latents) if name == "flux_dev" else latents.clone()
    final = ours(family, guidance, 1)
    with torch.no_grad():
        pictures = family.parts.vae.decode(family.to_vae(final)).sample / 2 + 0.5
    expected = family.parts(list(PROMPTS), latents=given, output_type="pt", **settings).images
    torch.testing.assert_close(pictures.clamp(0, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "multiple"),
    [("sdxl", 15, 2), ("sd3", 34, 4), ("flux_dev", 34, 4), ("zimage", 34, 4), ("sana", 48, 32)],
)
def test_sizes_that_do_not_fit_are_refused(name: str, size: int, multiple: int) -> None:
    with pytest.raises(UsageError, match=rf"init_args\.width is {size}.*multiple of {multiple}"):
        family_of(name, (None, size))


def test_an_option_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"init_args\.crop does not apply to FLUX\.1"):
        family_of("flux_dev", (32, 32), crop=(0, 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd3", {"shift_terminal": 0.1, "num_train_timesteps": 500}),
        ("flux_dev", {"shift_terminal": 0.1, "use_karras_sigmas": True}),
        *(
            pytest.param(name, options, marks=pytest.mark.slow)
            for name, options in (
                ("sd3", {"use_karras_sigmas": True}),
                ("sd3", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
                ("flux_dev", {"shift_terminal": 0.1}),
                ("flux_dev", {"use_exponential_sigmas": True}),
            )
        ),
    ],
    ids=str,
)
def test_options_that_change_the_grid_are_honoured(name: str, options: dict[str, Any]) -> None:
    parts = tiny(name)
    parts.scheduler = type(parts.scheduler).from_config(parts.scheduler.config, **options)
    family = FAMILIES[type(parts).__name__](parts, (32, 32))
    latents = ours(family, 2.0, 5)
    if name == "flux_dev":
        latents = packed(latents)
    expected = theirs(family, 5, guidance_scale=2.0)
    torch.testing.assert_close(latents, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("sd3", "stochastic_sampling"),
        ("flux_dev", "invert_sigmas"),
        ("sana", "use_dynamic_shifting"),  # its pipeline passes no shift
    ],
)
def test_options_that_are_sampled_otherwise_are_refused(name: str, option: str) -> None:
    parts = tiny(name)
    parts.scheduler.register_to_config(**{option: True})
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.pretrained: .*{option}.*; set "):
        FAMILIES[type(parts).__name__](parts, (32, 32))


def test_another_scheduler_is_refused() -> None:
    parts = tiny("flux_dev")
    parts.scheduler = DDIMScheduler()
    with pytest.raises(UsageError, match=r"DDIMScheduler.*FLUX\.1"):
        FAMILIES["FluxPipeline"](parts, (32, 32))


@pytest.mark.parametrize("name", ["sd3", "flux_dev", "sdxl"])
def test_parts_of_other_models_are_refused(name: str) -> None:
    parts = tiny(name)
    parts.vae = tiny("sdxl" if name == "sd3" else "sd3").vae
    if name == "flux_dev":
        parts.vae = tiny("sdxl").vae
    with pytest.raises(UsageError, match=r"reads \d+ channels and its VAE has \d+"):
        FAMILIES[type(parts).__name__](parts, (32, 32))
    parts = tiny(name)
    parts.text_encoder_2 = None
    with pytest.raises(UsageError, match="it has no text_encoder_2"):
        FAMILIES[type(parts).__name__](parts, (32, 32))


def test_stable_diffusion_3_comes_without_t5_too() -> None:
    family = family_of("sd3", (32, 32))
    family.parts.text_encoder_3 = None
    again = FAMILIES["StableDiffusion3Pipeline"](family.parts, (32, 32))
    expected = theirs(again, 3, guidance_scale=2.0)
    torch.testing.assert_close(ours(again, 2.0, 3), expected, atol=5e-5, rtol=1e-5)
    (shape,) = {tuple(t.shape[1:]) for t in [again.encode(["a"])["embedding"]]}
    assert shape == again.encoded_shapes()["embedding"]


@pytest.mark.parametrize(
    ("name", "expected"), [("sd3", [0.75, 0.52466]), ("zimage", [0.75, 0.3613])]
)
def test_training_times_are_those_of_the_model(name: str, expected: list[float]) -> None:
    """Before the shift of 3, of SD3 logit-normal: sigmoid(0), sigmoid(-1); else 0.5, 0.1587."""
    process = family_of(name, (32, 32)).process
    uniform = torch.tensor([0.5, 0.841345], dtype=torch.float64)
    assert process.draw_times(uniform).tolist() == pytest.approx(expected, abs=1e-4)
    # Above a cut the law is the same one, given that it lies there.
    assert float(process.draw_times(torch.ones(1).double(), low=0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["sd3", "flux_dev"])
def test_as_many_tokens_of_t5_as_diffusers_takes(name: str) -> None:
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 1}
    for length, expected in ((512, nullcontext()), (513, pytest.raises(ValueError, match="512"))):
        with expected:
            tiny(name)("a ring", max_sequence_length=length, output_type="latent", **call)
    shape = family_of(name, (32, 32), max_sequence_length=512).encoded_shapes()["embedding"]
    assert shape[0] >= 512
    with pytest.raises(
        UsageError, match=r"^pipeline\.init_args\.max_sequence_length is 513, .* 512 tokens; give"
    ):
        family_of(name, (32, 32), max_sequence_length=513)
