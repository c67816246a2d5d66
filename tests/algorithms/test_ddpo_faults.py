"""Silent faults that TRL 0.23.1's DDPOTrainer was seen to have, on a tiny diffusion model of ours.

Those shown elsewhere: a resumed run trains nothing, and ranks drift apart
(`tests/cli/test_ddpo.py`: `test_a_run_resumes_bit_by_bit`, `test_two_processes_train_like_one`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Colourfulness
from lit_rlft.algorithms.ddpo import DDPO, Rollout
from lit_rlft.cli import main
from lit_rlft.core.advantage import RunningAdvantage
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP
from lit_rlft.core.state import tensor_of
from lit_rlft.kit.data import Rows, collate
from lit_rlft.loop.reference import LoRA
from tests.algorithms.ddpo_support import ends_of
from tests.support import arguments, trainer_of, working_directory, write_picture_domain

STEPS, M = 4, 4
SIZE = (32, 32)  # attention over a single place would leave some layers without gradient
PROMPTS = ["a red ring", "a blue ring"]
ENDS = [(offset, to_one) for offset in (0, 1) for to_one in (False, True)]
each_end = pytest.mark.parametrize(("offset", "to_one"), ENDS)
Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    with working_directory(tmp_path):
        yield


def fit(folder: Path, name: str, **settings: Any) -> dict[str, Tensor]:
    """Train for two rounds through the command line; return the exported LoRA."""
    Path("prompts.txt").write_text("\n".join([*PROMPTS, "a green ring", "a star"]))
    domain = write_picture_domain(
        Path("domain.yaml"),
        folder,
        "prompts.txt",
        "Colourfulness",
        guidance_scale=3.0,
        batch_size=1,
    )
    flags = {
        "name": name,
        "model.init_args.sampler.num_steps": STEPS,
        "model.init_args.num_candidates": M,
        "model.init_args.lora.rank": 2,
        "model.init_args.lora.alpha": 6,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    main(arguments("fit", (domain, "configs/algorithms/ddpo.yaml"), flags))
    return load_file(f"runs/{name}/tuned/pytorch_lora_weights.safetensors")


def tuner_of(folder: Path, reward: Reward, offset: int = 1, pretrained: str | None = None) -> DDPO:
    pipeline = TextToImagePipeline(str(folder), guidance_scale=3.0)
    schedule = pipeline.process.schedule
    assert isinstance(schedule, DiscreteVP)
    schedule.steps_offset = offset  # diffusers loads every folder with 1
    advantage = RunningAdvantage(buffer_size=M, min_count=M)
    tuner = DDPO(
        pipeline,
        reward,
        num_candidates=M,
        advantage=advantage,
        sampler=Sampler(STEPS, 1.0),
        lora=LoRA(2, 6, pretrained=pretrained),
    )
    # As much of a trainer as `collect` looks at.
    trainer: Any = SimpleNamespace(
        world_size=1,
        progress_bar_callback=None,
        is_global_zero=True,
        strategy=SingleDeviceStrategy(),
    )
    tuner.trainer = trainer
    tuner.setup("fit")
    return tuner


@torch.no_grad()
def collected(tuner: DDPO) -> Rollout:
    batch = {"index": torch.arange(len(PROMPTS)), "prompt": PROMPTS}
    return tuner.collect(batch, tuner.pipeline.encode(batch))


@each_end
def test_a_last_step_without_noise_leaves_the_weights_finite(
    tiny_stable_diffusion: Folder, offset: int, to_one: bool
) -> None:
    """There, sigma 0 makes the log-probability NaN and, after one update, all weights."""
    folder = tiny_stable_diffusion(size=SIZE, scheduler={"set_alpha_to_one": to_one})
    tuner = tuner_of(folder, Colourfulness(), offset)
    rows = Rows(4, lambda i: {"prompt": PROMPTS[i % 2]})
    trainer_of().fit(tuner, DataLoader(rows, batch_size=2, collate_fn=collate))
    trained = dict(tuner.pipeline.denoiser.named_parameters())
    assert tuner.num_updates == 2
    assert all(value.isfinite().all() for value in trained.values())
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)


@each_end
def test_the_last_step_is_that_of_diffusers(
    tiny_stable_diffusion: Folder, offset: int, to_one: bool
) -> None:
    """There, set_alpha_to_one has no effect: the last step goes to the first level of the table."""
    folder = tiny_stable_diffusion(size=SIZE, scheduler={"set_alpha_to_one": to_one})
    tuner = tuner_of(folder, Colourfulness(), offset)
    rollout = collected(tuner)
    num = len(rollout)
    pairs = rollout.trajectories.pairs(torch.full((num,), STEPS - 1), torch.arange(num))
    x_t, x_s, t = (tensor_of(pairs[name]) for name in ("x_t", "x_s", "t"))
    s = ends_of(tuner, t)
    with torch.no_grad():
        prediction = tuner.pipeline(x_t, t, rollout.condition)
    law = tuner.pipeline.process.transition(prediction, x_t, t, s, 1.0)
    assert isinstance(law, Gaussian)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", steps_offset=offset)
    scheduler.set_timesteps(STEPS)

    def theirs(noise: Tensor) -> Tensor:
        last = int(scheduler.timesteps[-1])
        step = scheduler.step(prediction, last, x_t, eta=1.0, variance_noise=noise)
        return step.prev_sample

    mean = theirs(torch.zeros_like(x_t))
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    std = theirs(torch.ones_like(x_t)) - mean
    torch.testing.assert_close(law.std.expand_as(mean), std, rtol=1e-4, atol=1e-5)
    noiseless = to_one or not offset
    assert bool((law.std == 0).all()) is noiseless
    assert bool(rollout.trained[-1].any()) is not noiseless
    if noiseless:
        torch.testing.assert_close(x_s, mean, rtol=1e-5, atol=1e-5)


class Steps(Reward):
    """Colourfulness in whole steps, as integers or as floating-point numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.fine = dtype, Colourfulness()

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return (300 * self.fine(samples, condition)).round().to(self.dtype)


def test_integer_rewards_keep_the_fractions_of_advantages(tiny_stable_diffusion: Folder) -> None:
    """There, the statistics per prompt take the type of the rewards and cut advantages to it."""
    whole, real = (
        collected(tuner_of(tiny_stable_diffusion(size=SIZE), Steps(dtype))).advantages
        for dtype in (torch.int64, torch.float32)
    )
    assert torch.equal(whole, real)
    assert (whole - whole.round()).abs().max() > 0.1 and whole.std() > 0.5


def test_a_saved_lora_is_continued(tiny_stable_diffusion: Folder) -> None:
    """There, a fresh adapter is added beside the one that was loaded, and trained instead."""
    folder = tiny_stable_diffusion(size=SIZE)
    rate = "model__init_args__optimizer__init_args__lr"
    first = fit(folder, "first", **{rate: 0.02})
    start = {"model__init_args__lora__pretrained": "runs/first/tuned"}
    second = fit(folder, "second", **start, **{rate: 1e-5})
    fresh = fit(folder, "fresh", **{rate: 1e-5})
    assert second.keys() == first.keys() == fresh.keys()
    for name, value in second.items():
        # A few Adam steps of 1e-5 away from where the first run ended, and not at it.
        assert 0 < (value - first[name]).abs().max() < 1e-4, name
        assert (fresh[name] - first[name]).abs().max() > 1e-2, name


def test_the_reference_of_a_continued_lora_is_the_pretrained_model(
    tiny_stable_diffusion: Folder,
) -> None:
    fit(tiny_stable_diffusion(size=SIZE), "run", model__init_args__optimizer__init_args__lr=0.02)
    plain = tuner_of(tiny_stable_diffusion(size=SIZE), Colourfulness())
    tuned = "runs/run/tuned"
    tuner = tuner_of(tiny_stable_diffusion(size=SIZE), Colourfulness(), pretrained=tuned)
    condition = tuner.pipeline.encode({"prompt": PROMPTS})
    x_t = torch.randn(2, *tensor_of(tuner.pipeline.blank(condition)).shape[1:])
    with torch.no_grad():
        t = torch.full((2,), 0.5, dtype=torch.float64)
        expected = tensor_of(plain.pipeline(x_t, t, condition))
        reference = tensor_of(tuner.reference(x_t, t, condition))
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-6)
        assert (tensor_of(tuner.pipeline(x_t, t, condition)) - expected).abs().max() > 1e-3
