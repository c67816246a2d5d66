"""Fixtures of all tests: one thread, no network, one seed, and a tiny Stable Diffusion folder.

Tests run on the processor: GPUs are hidden, before torch looks for them.
No test may depend on the processor. To try that, set LIT_RLFT_TEST_THREADS to another number of
threads, or LIT_RLFT_TEST_ROUNDING to 1 for the rounding of another processor (`tests/rounding.py`).
LIT_RLFT_TEST_DEVICE=second has trainers train on another device (`tests/second_device.py`): what
fails in the package is a fault then, but many tests compare with tensors on the CPU themselves.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rounding import OtherRounding

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(int(os.environ.get("LIT_RLFT_TEST_THREADS", "1")))
if os.environ.get("LIT_RLFT_TEST_ROUNDING") == "1":
    OtherRounding().__enter__()
if os.environ.get("LIT_RLFT_TEST_DEVICE") == "second":
    from tests.second_device import second_device, trainers_on_it

    everywhere = contextlib.ExitStack()
    everywhere.enter_context(second_device())
    everywhere.enter_context(trainers_on_it())
    atexit.register(everywhere.close)

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "domains/text_to_image/assets/shapes/tokenizer"


HEAVY = (
    "test_devices",
    "test_documentation",
    "test_notebooks",
    "test_from_python",
    "test_runs",
    "test_configs",
)
"""Files that take longest; begun last, one worker would end long after the others."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests on another device to processes of their own (`test_devices.py`)."""
    if collection_path.name != "test_second_device.py":
        return None
    return collection_path not in [Path(arg.split("::")[0]).resolve() for arg in config.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    items.sort(key=lambda item: item.path.stem not in HEAVY)


@pytest.fixture(autouse=True, scope="session")
def repository_stays_clean() -> Iterator[None]:
    """Fail where tests have left a run's files at the root of the repository."""
    left = [ROOT / name for name in ("tuned", "metrics.json", "lightning_logs")]
    before = [path.exists() for path in left]
    yield
    new = [path.name for path, was in zip(left, before, strict=True) if path.exists() and not was]
    assert not new, f"tests left {new} in {ROOT}; give their trainers default_root_dir"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make no test depend on what ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def second() -> Iterator[torch.device]:
    """Give a device that is not the CPU, for this test alone."""
    from tests.second_device import SUPPORTED, second_device  # imports Lightning

    if not SUPPORTED:
        pytest.skip("torch has no device made in Python")
    with second_device() as device:
        yield device


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a StableDiffusionPipeline folder with seeded random weights.

    Its keywords, all of which have defaults: `prediction_type`, `size` (pixels, height and width;
    the U-Net's sample_size is an int for squares, else a list), `factor` (pixels per latent: 2, 4
    or 8), `width` (channels), `seed`, `scheduler` (further fields of the DDIMScheduler).
    A folder is written once per session: copy it before changing it.
    """

    @cache
    def write(
        prediction_type: str = "epsilon",
        size: tuple[int, int] = (16, 16),
        factor: int = 8,
        width: int = 8,
        seed: int = 0,
        scheduler: tuple[tuple[str, Any], ...] = (),
    ) -> Path:
        folder = tmp_path_factory.mktemp("stable_diffusion") / "tiny"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts = _parts(size, factor, width)
        _write(folder, parts, prediction_type=prediction_type, **dict(scheduler))
        return folder

    def tiny(*, scheduler: dict[str, Any] | None = None, **settings: Any) -> Path:
        return write(scheduler=tuple(sorted((scheduler or {}).items())), **settings)

    return tiny


def _parts(size: tuple[int, int], factor: int, width: int) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert not any(pixels % factor for pixels in size)
    latents = [pixels // factor for pixels in size]
    unet = UNet2DConditionModel(
        sample_size=latents[0] if latents[0] == latents[1] else latents,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=2 * width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    levels = factor.bit_length()
    vae = AutoencoderKL(
        sample_size=max(size),
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(width,) * levels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=False,
    )
    encoder = CLIPTextModel(text)
    return {"tokenizer": tokenizer, "text_encoder": encoder, "unet": unet, "vae": vae}


def _write(folder: Path, parts: dict[str, Any], **scheduler: Any) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings = {**betas, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        **parts,
        scheduler=DDIMScheduler(**{**settings, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
