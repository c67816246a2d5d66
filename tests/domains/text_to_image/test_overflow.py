"""Numbers that overflow are named: text encoder, denoiser or VAE, with a remedy that works."""

import copy

import pytest
import torch

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from tests.domains.text_to_image.families.tiny import tiny

LARGEST = 65504  # of float16


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> TextToImagePipeline:
    """Return a tiny model."""
    path = tmp_path_factory.mktemp("overflow") / "sd"
    tiny("sd").save_pretrained(path)
    return TextToImagePipeline(str(path), guidance_scale=1.0)


def large(
    pipeline: TextToImagePipeline, layer: str | None, dtype: torch.dtype
) -> TextToImagePipeline:
    """Return a copy with one layer whose weights float16 can hold, but not the layer's outputs."""
    changed = copy.deepcopy(pipeline)
    if layer:
        changed.get_submodule(layer).weight.data.fill_(LARGEST / 2)  # type: ignore[operator]
    changed.denoiser.to(dtype)
    changed.vae.to(dtype)
    return changed


@torch.no_grad()
def pictures(pipeline: TextToImagePipeline) -> torch.Tensor:
    """Sample two pictures."""
    condition = pipeline.encode({"prompt": ["a red ring", "a dot"]})
    blank = pipeline.blank(condition)
    z = torch.randn(blank.shape, generator=torch.Generator().manual_seed(2)).to(blank)
    x_0 = Sampler(num_steps=1).sample(pipeline, pipeline.process, z, condition)
    return pipeline.decode(x_0, condition)


DENOISER = "latents are not finite .*the denoiser overflows in float16; set .*dtype to bfloat16$"
VAE = "pictures are not finite .*the VAE overflows in float16; set .*dtype to bfloat16, or .*vae to"


@pytest.mark.parametrize(
    ("layer", "sentence"), [("denoiser.conv_out", DENOISER), ("vae.decoder.conv_out", VAE)]
)
def test_overflow_in_sampling_is_named_and_bfloat16_is_a_remedy(
    pipeline: TextToImagePipeline, layer: str, sentence: str
) -> None:
    assert pictures(large(pipeline, None, torch.float16)).isfinite().all()
    with pytest.raises(UsageError, match=sentence):
        pictures(large(pipeline, layer, torch.float16))
    assert pictures(large(pipeline, layer, torch.bfloat16)).isfinite().all()


def test_overflow_in_encoding_pictures_is_named(pipeline: TextToImagePipeline) -> None:
    batch = {"image": torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)}
    layer = "vae.encoder.conv_out"
    sentence = "latents of the given pictures are not .*the VAE overflows in float16"
    with pytest.raises(UsageError, match=sentence):
        large(pipeline, layer, torch.float16).states(batch)
    assert large(pipeline, layer, torch.bfloat16).states(batch).isfinite().all()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            "denoiser",
            "latents are not finite .*infinite.: so are weights of the denoiser: its files",
        ),
        ("encoder", "encodings of the prompts are not finite .*weights of the text encoder"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    pipeline: TextToImagePipeline, broken: str, sentence: str
) -> None:
    pipeline = large(pipeline, None, torch.float32)
    next(getattr(pipeline, broken).parameters()).data.fill_(float("nan"))
    with pytest.raises(UsageError, match=sentence):
        pictures(pipeline)


def test_under_autocast_the_remedy_is_the_trainers_precision(pipeline: TextToImagePipeline) -> None:
    pipeline = large(pipeline, "vae.decoder.conv_out", torch.float32)
    pipeline.vae.register_to_config(force_upcast=False)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(
            UsageError, match=r"VAE overflows in float16; set trainer\.precision to bf16-"
        ),
    ):
        pictures(pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        assert pictures(pipeline).isfinite().all()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_vae_that_overflows_stays_in_single_under_autocast(
    pipeline: TextToImagePipeline, checkpointed: bool
) -> None:
    pipeline = large(pipeline, "vae.decoder.conv_out", torch.float32)
    pipeline.vae.encoder.conv_out.weight.data.fill_(LARGEST / 2)
    pipeline.checkpoint_decoder = checkpointed
    assert pipeline.vae.config["force_upcast"]
    kinds: dict[str, set[torch.dtype]] = {"vae": set(), "denoiser": set()}
    for name, layer in (("vae", pipeline.vae.decoder), ("denoiser", pipeline.denoiser)):
        layer.conv_in.register_forward_hook(
            lambda _, args, made, name=name: kinds[name].add(made.dtype)
        )
    condition = pipeline.encode({"prompt": ["a red ring"]})
    latents = torch.randn(pipeline.blank(condition).shape, requires_grad=True)
    image = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    with torch.autocast("cpu", torch.float16):
        assert pictures(pipeline).isfinite().all()
        assert pipeline.states({"image": image}).isfinite().all()
        decoded = pipeline.decode(latents, condition)
    decoded.mean().backward()
    assert latents.grad is not None and latents.grad.isfinite().all()
    assert kinds == {"vae": {torch.float32}, "denoiser": {torch.float16}}
