"""The pipeline: what diffusers saved, sampled as diffusers samples it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from domains.image.pipeline import ImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA, attach_lora
from tests.domains.image.conftest import TINY
from tests.support import assert_close_in_rounding

UNet = Callable[..., UNet2DModel]
Make = Callable[..., ImagePipeline]


def condition_of(pipeline: ImagePipeline, num: int) -> Condition:
    return pipeline.encode({"index": torch.arange(num)})


def noise(num: int = 2, channels: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sampled(pipeline: ImagePipeline, x_1: torch.Tensor, num_steps: int) -> torch.Tensor:
    condition = condition_of(pipeline, len(x_1))
    x_0 = Sampler(num_steps).sample(pipeline, pipeline.process, x_1, condition)
    assert isinstance(x_0, torch.Tensor)
    return x_0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_are_sampled_as_diffusers_samples_them(
    shift: float, tiny_unet: UNet, tmp_path: Path
) -> None:
    unet, scheduler = tiny_unet(), FlowMatchEulerDiscreteScheduler(shift=shift)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "flow")
    pipeline = ImagePipeline(str(tmp_path / "flow"))
    x = x_1 = noise()
    num_steps = 5
    # diffusers shifts the levels that it is given.
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, return_dict=False)[0]
    torch.testing.assert_close(sampled(pipeline, x_1, num_steps), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpms_keep_their_schedule(prediction_type: str, tiny_unet: UNet, tmp_path: Path) -> None:
    unet = tiny_unet()
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "ddpm")
    pipeline = ImagePipeline(str(tmp_path / "ddpm"))
    x = x_1 = noise()
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.0, return_dict=False)[0]
    torch.testing.assert_close(sampled(pipeline, x_1, 10), x, rtol=1e-4, atol=1e-4)


def test_ddpms_are_sampled_as_their_pipeline_samples_them(tiny_unet: UNet, tmp_path: Path) -> None:
    """A cosine table with epsilon, clipped, with diffusers' noise of every step."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    DDPMPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(tmp_path / "ddpm")
    theirs = DDPMPipeline.from_pretrained(tmp_path / "ddpm")
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    expected = theirs(batch_size=2, num_inference_steps=6, output_type="np").images
    pipeline = ImagePipeline(str(tmp_path / "ddpm"))
    condition = condition_of(pipeline, 2)
    torch.manual_seed(3)
    x_1 = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        x_0 = Sampler(6, 1.0).sample(pipeline, pipeline.process, x_1, condition)
    pictures = pipeline.decode(x_0, condition).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-4)


def test_a_ddim_pipeline_turns_its_scheduler_into_a_ddim_one(
    tiny_unet: UNet, tmp_path: Path
) -> None:
    """It drops the other class's defaults: Euler's "linspace" becomes DDIM's "leading"."""
    DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02).save_pretrained(
        tmp_path / "ddim/scheduler"
    )
    index = tmp_path / "ddim/model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    theirs = DDIMPipeline.from_pretrained(tmp_path / "ddim")
    assert isinstance(theirs.scheduler, DDIMScheduler)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = theirs(
        batch_size=2, generator=generator, num_inference_steps=7, output_type="np"
    ).images
    pipeline = ImagePipeline(str(tmp_path / "ddim"))
    x_0 = sampled(pipeline, noise(), 7)
    pictures = pipeline.decode(x_0, condition_of(pipeline, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_exported_flow_is_sampled_alike_by_diffusers(shift: float, tmp_path: Path) -> None:
    """Its pipeline calls set_timesteps(N) alone; N is the number of steps of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = ImagePipeline(None, architecture=TINY, shift=shift)
    ours = sampled(pipeline, noise(), 5)
    pipeline.save(tmp_path / "saved")
    theirs = DDPMPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = theirs(
        batch_size=2, generator=generator, num_inference_steps=5, output_type="np"
    ).images
    pictures = pipeline.decode(ours, condition_of(pipeline, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-5)
    again = ImagePipeline(str(tmp_path / "saved"))
    assert_close_in_rounding(sampled(again, noise(), 5), ours)
    for other in (1, 2, 20):  # the model's own grid, not the exported one stretched
        assert torch.equal(again.process.times(other), pipeline.process.times(other))
    again.process.times(5)
    again.save(tmp_path / "again")
    paths = (tmp_path / name / "scheduler/scheduler_config.json" for name in ("saved", "again"))
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert first == second


def test_an_exported_flow_changed_by_hand_is_taken_as_it_is(tmp_path: Path) -> None:
    pipeline = ImagePipeline(None, architecture=TINY)
    pipeline.process.times(5)
    pipeline.save(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for changed in ({"shift_terminal": 0.1}, {"_made_of": {"shift": "1"}}):
        path.write_text(json.dumps(config | changed), encoding="utf-8")
        own = ImagePipeline(str(tmp_path)).process.times(4)
        theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(path.parent)
        theirs.set_timesteps(4)
        assert torch.equal(own.float(), theirs.sigmas)


def test_networks_alone_need_a_schedule(tiny_unet: UNet, tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    path = str(tmp_path / "unet")
    with pytest.raises(UsageError, match=r"schedule must be .* a network without a scheduler"):
        ImagePipeline(path)
    shifted = ImagePipeline(path, schedule="rectified_flow", shift=3.0)
    # u of the even grid goes to 3 u / (1 + 2 u).
    torch.testing.assert_close(
        shifted.process.times(2).float(), torch.tensor([1, 0.75, 0.0]), atol=2e-3, rtol=0
    )
    with pytest.raises(UsageError, match="shift must be 1 but for a new rectified flow, got 3"):
        ImagePipeline(path, schedule="ddpm", shift=3.0)
    flow, ddpm = (ImagePipeline(path, schedule=s) for s in ("rectified_flow", "ddpm"))  # type: ignore[arg-type]
    assert flow.process.prediction_type == "velocity"
    assert ddpm.process.prediction_type == "epsilon"
    # By diffusers' own table.
    t = torch.ones(2, dtype=torch.float64)
    alpha = ddpm.process.schedule.alpha(t)[0].item()
    expected = DDPMScheduler().alphas_cumprod[-1].sqrt().item()
    assert alpha == pytest.approx(expected, rel=1e-6)


def test_a_saved_scheduler_is_not_replaced() -> None:
    with pytest.raises(UsageError, match="schedule must be 'saved': 'digits' has the scheduler"):
        ImagePipeline("digits", schedule="ddpm")
    with pytest.raises(UsageError, match="shift must be 1 "):
        ImagePipeline("digits", shift=3.0)


def test_the_network_sees_the_time_that_diffusers_tells_it(tiny_pipeline: Make) -> None:
    flow, ddpm = tiny_pipeline(), tiny_pipeline("ddpm")
    seen: list[torch.Tensor] = []
    for pipeline in (flow, ddpm):
        pipeline.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        t = torch.tensor([1.0, 0.25])
        pipeline.predict(noise(), t, condition_of(pipeline, 2))
    assert seen[0].tolist() == [1000.0, 250.0]
    assert seen[1].tolist() == [999, 249]


def test_states_and_pictures(tiny_pipeline: Make) -> None:
    colour, grey = tiny_pipeline(), tiny_pipeline(in_channels=1, out_channels=1)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    x_0 = colour.states({"image": images})
    assert x_0.min() >= -1 and x_0.max() <= 1
    condition = condition_of(colour, 2)
    pictures = colour.decode(x_0, condition)
    torch.testing.assert_close(pictures, images / 255, rtol=0, atol=1e-6)
    assert colour.blank(condition).shape == (2, 3, 8, 8)
    x_0 = grey.states({"image": images[:, :1]})
    assert grey.blank(condition).shape == x_0.shape == (2, 1, 8, 8)
    pictures = grey.decode(x_0, condition)
    torch.testing.assert_close(pictures, (images[:, :1] / 255).expand(-1, 3, -1, -1))
    assert (grey.decode(3 * torch.ones(2, 1, 8, 8), condition) == 1).all()


def test_data_of_another_size_are_refused(tiny_pipeline: Make) -> None:
    with pytest.raises(UsageError, match=r"images \[1, 8, 8\], the model .* has \[3, 8, 8\]"):
        tiny_pipeline().states({"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})


def test_every_sample_has_the_same_condition(tiny_pipeline: Make) -> None:
    pipeline = tiny_pipeline()
    condition = condition_of(pipeline, 3)
    assert len(condition) == 3 and list(condition.entries) == [{"name": "image"}]
    assert pipeline.features(condition).shape == (3, 1)
    assert len(pipeline.example()) == 1


def test_what_is_saved_diffusers_samples(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = ImagePipeline(None, architecture=TINY)
    pipeline.save(tmp_path / "saved")
    theirs = DDPMPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(theirs.scheduler, FlowMatchEulerDiscreteScheduler)
    theirs.set_progress_bar_config(disable=True)
    pictures = theirs(batch_size=2, num_inference_steps=3, output_type="np").images
    assert pictures.shape == (2, 8, 8, 3) and np.isfinite(pictures).all()
    again = ImagePipeline(str(tmp_path / "saved"))
    assert_close_in_rounding(sampled(again, noise(), 3), sampled(pipeline, noise(), 3))
    assert again.process.prediction_type == "velocity" and again.name == "saved"


@pytest.mark.parametrize(
    "targets", [None, ["conv_in", "conv_out"], ["to_q", "time_emb_proj", "linear_1", "conv"]]
)
def test_a_saved_lora_is_merged(
    tmp_path: Path, tiny_pipeline: Make, targets: list[str] | None
) -> None:
    pipeline = tiny_pipeline()
    plain = sampled(pipeline, noise(), 3)
    attach_lora(pipeline, LoRA(rank=2, alpha=5, targets=targets))
    adapted = {n for n, p in pipeline.denoiser.named_parameters() if p.requires_grad}
    if targets is None:
        assert any("attentions" in n for n in adapted) and any("conv1" in n for n in adapted)
    torch.testing.assert_close(sampled(pipeline, noise(), 3), plain)  # it starts at zero
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    tuned = sampled(pipeline, noise(), 3)
    assert (tuned - plain).abs().max() > 0.01
    pipeline.save(tmp_path / "saved")
    again = ImagePipeline(str(tmp_path / "saved"))
    torch.testing.assert_close(sampled(again, noise(), 3), tuned, rtol=1e-4, atol=1e-5)
    assert torch.equal(sampled(pipeline, noise(), 3), tuned)  # saving changes nothing
    theirs = DDPMPipeline.from_pretrained(tmp_path / "saved").unet
    inputs = noise(), torch.tensor([500, 100])
    with torch.no_grad():
        expected = pipeline.denoiser(*inputs).sample
        torch.testing.assert_close(theirs(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alone", [True, False])
def test_the_only_variant_is_found(tmp_path: Path, tiny_unet: UNet, alone: bool) -> None:
    unet = tiny_unet()
    if alone:
        unet.save_pretrained(tmp_path / "m", variant="fp16")
    else:
        pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=False))
        pipeline.save_pretrained(tmp_path / "m", variant="fp16")
    schedule: Any = "ddpm" if alone else "saved"
    for variant in (None, "fp16"):
        loaded = ImagePipeline(str(tmp_path / "m"), variant=variant, schedule=schedule)
        assert torch.equal(loaded.denoiser.conv_in.weight, unet.conv_in.weight)


def test_samples_are_written_as_png(tmp_path: Path, tiny_pipeline: Make) -> None:
    pipeline = tiny_pipeline()
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures[1] = pictures[1, :1]
    paths = pipeline.save_samples(pictures, condition_of(pipeline, 2), tmp_path, ["a", "b"])
    assert paths == [tmp_path / "a.png", tmp_path / "b.png"]
    colour, grey = (Image.open(path) for path in paths)
    assert (colour.mode, grey.mode) == ("RGB", "L")
    expected = (pictures * 255).round()
    np.testing.assert_array_equal(np.asarray(colour), expected[0].permute(1, 2, 0))
    np.testing.assert_array_equal(np.asarray(grey), expected[1, 0])


def test_gradients_reach_the_noise(tiny_pipeline: Make) -> None:
    pipeline, x_1 = tiny_pipeline(), (0.1 * noise()).requires_grad_()
    condition = condition_of(pipeline, 2)
    x_0 = Sampler(2).sample(pipeline, pipeline.process, x_1, condition)
    pipeline.decode(x_0, condition).sum().backward()
    assert x_1.grad is not None and (x_1.grad.flatten(1).norm(dim=1) > 0).all()


def test_what_is_no_model_of_images(tiny_unet: UNet, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UsageError, match=message):
            ImagePipeline(**settings)

    refused("could not be loaded", pretrained=str(tmp_path / "none"))
    refused("could not be loaded", pretrained=str(tmp_path))
    refused("either pretrained or architecture", pretrained=None)
    refused("either pretrained or architecture", pretrained="digits", architecture=TINY)
    refused("none of a UNet2DModel", pretrained=None, architecture={"sampl_size": 8})
    refused("none of a UNet2DModel", pretrained=None, architecture={**TINY, "up_block_types": ()})
    refused("no sample_size", pretrained=None, architecture={**TINY, "sample_size": None})
    classes = {**TINY, "num_class_embeds": 10}
    refused("conditioned on classes", pretrained=None, architecture=classes)
    odd = {**TINY, "sample_size": 7}
    refused(r"called with images \[1, 3, 7, 7\]", pretrained=None, architecture=odd)
    refused("from 3 to 6 channels", pretrained=None, architecture={**TINY, "out_channels": 6})
    unet = tiny_unet()
    UNet2DConditionModel(
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "text")
    refused("has a UNet2DConditionModel, not a UNet2DModel", pretrained=str(tmp_path / "text"))
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "latent")
    index = json.loads((tmp_path / "latent" / "model_index.json").read_text())
    index = {**index, "_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "latent" / "model_index.json").write_text(json.dumps(index))
    refused("LDMPipeline, has a vqvae beside its U-Net", pretrained=str(tmp_path / "latent"))
    DDPMPipeline(unet=unet, scheduler=ScoreSdeVeScheduler()).save_pretrained(tmp_path / "ve")
    refused("neither a rectified flow nor a discrete VP", pretrained=str(tmp_path / "ve"))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    DDPMPipeline(unet=unet, scheduler=dynamic).save_pretrained(tmp_path / "dynamic")
    refused("use_dynamic_shifting is not supported", pretrained=str(tmp_path / "dynamic"))
