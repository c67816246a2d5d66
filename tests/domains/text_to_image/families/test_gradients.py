"""Reward gradients of SDXL and FLUX.1 equal a loop that is written out on diffusers' networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT, DRTune, GradientMethod, GradientPlan
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA
from tests.domains.text_to_image.families.tiny import tiny

PROMPTS = ["a red ring", "a blue square below"]
SEEDS = [7, 8]
HEIGHT, WIDTH = 16, 24
T = 5
Step = Callable[[Tensor, Tensor, bool], Tensor]


class Pattern(Reward):
    """Mean of the pictures, weighted by a fixed pattern of pixels and squared."""

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        pattern = torch.randn(samples.shape[1:], generator=generator, dtype=torch.float64)
        return (samples * pattern).flatten(1).mean(dim=1) + samples.square().flatten(1).mean(dim=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("sdxl", "flux_dev"):
        tiny(name).save_pretrained(folder / name)
    return folder


def tuner_of(folder: Path, method: GradientMethod, **settings: Any) -> RewardGradient:
    """Return a tuner in float64 whose LoRA changes something."""
    pipeline = TextToImagePipeline(str(folder), height=HEIGHT, width=WIDTH, **settings)
    pipeline.double()
    tuner = RewardGradient(
        pipeline, Pattern(), method=method, lora=LoRA(rank=2, alpha=3), sampler=Sampler(T)
    )
    tuner.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuner.trainable().named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return tuner


def ours(tuner: RewardGradient) -> list[Tensor]:
    """Return the update's gradients."""
    condition = tuner.pipeline.encode({"prompt": PROMPTS})
    loss, _ = tuner.loss(Experience({}, condition, SEEDS), generators(SEEDS))
    return torch.autograd.grad(loss.mean(), weights(tuner))


def weights(tuner: RewardGradient) -> list[Tensor]:
    return [p for p in tuner.trainable().parameters() if p.requires_grad]


def noise(channels: int) -> Tensor:
    """Return the initial latents."""
    shape = (channels, HEIGHT // 2, WIDTH // 2)
    drawn = [torch.randn(shape, generator=each, dtype=torch.float64) for each in generators(SEEDS)]
    return torch.stack(drawn)


def guided(predict: Step, w: float, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return u + w (c - u), of which the conditional part alone may carry gradient."""

    def prediction(x: Tensor, t: Tensor) -> Tensor:
        if w <= 1:
            return predict(x, t, True)
        u, c = predict(x, t, False), predict(x, t, True)
        return (u.detach() if mode == "conditional" else u) * (1 - w) + w * c

    return prediction


def pictures_of_sdxl(parts: Any, plan: GradientPlan, w: float, mode: str, detach: bool) -> Tensor:
    """Walk Stable Diffusion XL by DDIM and decode."""
    given = parts.encode_prompt(PROMPTS, negative_prompt=None)
    embedding, null_embedding, pooled, null_pooled = (part.double() for part in given)
    sizes = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2, dtype=torch.float64)

    def predict(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        added = {"text_embeds": pooled if conditional else null_pooled, "time_ids": sizes}
        text = embedding if conditional else null_embedding
        return parts.unet(x, t.float(), text, added_cond_kwargs=added, return_dict=False)[0]

    parts.scheduler.set_timesteps(T)
    levels = [int(t) for t in parts.scheduler.timesteps]
    table = parts.scheduler.alphas_cumprod.double()
    signal = [table[level] for level in levels] + [torch.ones((), dtype=torch.float64)]
    call = guided(predict, w, mode)
    x = noise(4)
    for i, step in enumerate(range(T, 0, -1)):
        trained = step in plan.trained
        with torch.set_grad_enabled(trained):
            epsilon = call(x.detach() if detach else x, torch.tensor([levels[i]] * 2))
        x_0 = (x - (1 - signal[i]).sqrt() * epsilon) / signal[i].sqrt()
        if step == plan.stop:
            x = x_0
            break
        x = signal[i + 1].sqrt() * x_0 + (1 - signal[i + 1]).sqrt() * epsilon
    return decoded(parts, x)


def pictures_of_flux(parts: Any, plan: GradientPlan, w: float, mode: str, detach: bool) -> Tensor:
    """Walk FLUX.1 by Euler steps on packed tokens and decode."""
    height, width = HEIGHT // 2, WIDTH // 2
    encoded = {
        conditional: [part.double() for part in parts.encode_prompt(prompts)[:2]]
        for conditional, prompts in ((True, PROMPTS), (False, ["dull"] * 2))
    }
    places = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.double)

    def predict(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        text, pooled = encoded[conditional]
        return parts.transformer(
            x,
            timestep=t.float(),
            guidance=torch.full((2,), 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.float64),
            img_ids=places,
            return_dict=False,
        )[0]

    mu = 0.5 + (1.15 - 0.5) * (height * width // 4 - 256) / (4096 - 256)
    even = torch.linspace(1, 1 / T, T, dtype=torch.float64)
    shift = torch.tensor(mu, dtype=torch.float64).exp()
    times = torch.cat([shift * even / (1 + (shift - 1) * even), even.new_zeros(1)])
    call = guided(predict, w, mode)
    z = noise(16)
    x = FluxPipeline._pack_latents(z, *z.shape)
    for i, step in enumerate(range(T, 0, -1)):
        with torch.set_grad_enabled(step in plan.trained):
            velocity = call(x.detach() if detach else x, times[i].expand(2))
        x = x - (times[i] if step == plan.stop else times[i] - times[i + 1]) * velocity
        if step == plan.stop:
            break
    # Two pixels per latent here, so that the pipeline's own unpacking is told twice the latents.
    return decoded(parts, FluxPipeline._unpack_latents(x, HEIGHT, WIDTH, parts.vae_scale_factor))


def decoded(parts: Any, latents: Tensor) -> Tensor:
    config = parts.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return (parts.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


METHODS = {
    "drtune": (DRTune(k=2, m=3), True),
    "drtune_attached": (DRTune(k=2, m=3, detach_input=False), False),
    "draft": (DRaFT(k=2), False),
}
"""Methods, and whether they detach the denoiser's input."""
CALLS: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "sdxl": ("sdxl", {"guidance_scale": 2.5}, 2.5, "both"),
    "sdxl_conditional": (
        "sdxl",
        {"guidance_scale": 2.5, "guidance_gradient": "conditional"},
        2.5,
        "conditional",
    ),
    "flux": ("flux_dev", {"guidance_scale": 3.5}, 1.0, "both"),
    "flux_true_cfg": ("flux_dev", {"true_cfg_scale": 2.0, "negative_prompt": "dull"}, 2.0, "both"),
}
"""Models, settings of our pipeline, and w and the mode of classifier-free guidance."""
DEFAULT = {("sdxl", "drtune"), ("flux_true_cfg", "drtune")}


@pytest.mark.parametrize(
    ("call", "method"),
    [
        pytest.param(call, method, marks=[] if (call, method) in DEFAULT else pytest.mark.slow)
        for call in CALLS
        for method in METHODS
    ],
)
def test_gradients_are_those_of_the_loop(call: str, method: str, models: Path) -> None:
    name, settings, w, mode = CALLS[call]
    drawn, detach = METHODS[method]
    tuner = tuner_of(models / name, drawn, **settings)
    found = ours(tuner)
    pipeline: Any = tuner.pipeline
    plan = tuner.draw_plan()
    assert len(plan.trained) == 2
    assert (plan.stop or 0) > 1 or method == "draft"  # the walk stops early
    walked = pictures_of_sdxl if name == "sdxl" else pictures_of_flux
    pictures = walked(pipeline.diffusers, plan, w, mode, detach)
    loss = -Pattern()(pictures, None).mean()
    expected = torch.autograd.grad(loss, weights(tuner))
    assert sum(float(g.abs().max()) > 0 for g in expected) == len(expected) > 0
    largest = max(float(g.norm()) for g in expected)
    for mine, other in zip(found, expected, strict=True):
        assert float((mine - other).norm()) < 1e-8 * max(float(other.norm()), 1e-3 * largest)
