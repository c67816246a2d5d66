"""Tuned models as ordinary diffusers pipelines.

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
pipe = load_tuned(pipe, "runs/<name>/tuned")
picture = pipe("a red ring", num_inference_steps=50).images[0]
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import pooled, tokens_of
from lit_rlft.core.sampling import steps_of_share
from lit_rlft.inference.noise_generator import NoiseGenerator
from lit_rlft.kit.captions import filled, masked
from lit_rlft.runs.card import read_card

__all__ = ["load_tuned"]

P = TypeVar("P")
_LORA, _NOISE = "pytorch_lora_weights.safetensors", "noise_generator.safetensors"
_WHOLE = "model_index.json"
_ENCODINGS = {
    "StableDiffusionPipeline": (0,),
    "StableDiffusionXLPipeline": (0, 2),
    "StableDiffusion3Pipeline": (0, 2),
    "FluxPipeline": (0, 1),
    "Flux2KleinPipeline": (0,),
    "ZImagePipeline": (0,),
    "SanaPipeline": (0,),
}
"""Where a pipeline's `encode_prompt` returns the prompts' embeddings and pooled embeddings."""


def load_tuned(pipe: P, folder: str | Path) -> P:
    """Make a diffusers pipeline draw as a tuned model does; return it.

    Its call then runs the steps that the tuned model ran with the LoRA, or the fully trained
    denoiser, and the others without, as P-GRAFT's last ones; or it draws its initial noise from the
    prior that Noise PPO learned. All arguments of the call stay as they are. Unless given,
    `num_inference_steps` is what the model was tuned with, and so is `max_sequence_length` where
    the folder says it.

    The pictures are those that were tuned and measured. Where that took the steps of another
    scheduler than the model's, it takes that one's place, and `eta` is the sampler's unless given.
    A scheduler of another class that you set, before this or after it, stays. Where no scheduler of
    diffusers takes the sampler's steps, the model's own stays, as the model card says.

    Under a scheduler that calls the denoiser more than once a step (PNDM, Heun, KDPM2) the timestep
    decides: the LoRA is on above that of the first step that was not tuned. A second call on the
    same pipeline takes the first one's LoRA out.

    A pipeline that begins with a picture (img2img, inpainting) runs its steps as at their place in
    the whole.

    As in diffusers, other LoRAs are off once this one is loaded; `set_adapters` sets them beside
    it. Only the tuned model's own is switched within a call, and what you switch off stays off.

    Args:
        pipe: A pipeline of diffusers with the weights that were tuned; it is changed.
        folder: The folder `tuned` of a run.

    Raises:
        UsageError: The folder is no tuned model of a LoRA, a prior or a part of the steps.
    """
    folder = Path(folder)
    card = read_card(folder)
    has_lora, has_noise, whole = _held(folder, card)
    _take_out(pipe)
    adapter = _put_in(pipe, folder) if has_lora else None
    pretrained = _exchanged(pipe, folder) if whole else None
    if not isinstance(pipe, _Tuned):
        kind = type(pipe)
        pipe.__class__ = type(kind.__name__, (_Tuned, kind), {"__module__": kind.__module__})
    pipe._tuned_adapter, pipe._tuned_off = adapter, None  # type: ignore[attr-defined]
    pipe._tuned_pretrained, pipe._tuned_whole = pretrained, None  # type: ignore[attr-defined]
    pipe._tuned_schedulers = _swap(pipe, card.get("scheduler") or {})  # type: ignore[attr-defined]
    pipe._tuned_eta = card.get("eta", 0.0) if card.get("transition") == "eta" else 0.0  # type: ignore[attr-defined]
    pipe._tuned_shares = _shares(card) if has_lora or whole else (0.0, 0.0)  # type: ignore[attr-defined]
    pipe._tuned_num_steps = card["num_steps"]  # type: ignore[attr-defined]
    pipe._tuned_length = card.get("max_sequence_length")  # type: ignore[attr-defined]
    pipe._tuned_noise = NoiseGenerator.load(folder / _NOISE) if has_noise else None  # type: ignore[attr-defined]
    return pipe


def _held(folder: Path, card: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether a folder has a LoRA, a prior, or a whole model for a part of the steps."""
    lora, noise, whole = ((folder / name).is_file() for name in (_LORA, _NOISE, _WHOLE))
    whole = whole and 0 < card["tuned_steps"] < card["num_steps"]  # a corrector runs none
    if not lora and not noise and not whole:
        raise UsageError(
            f"{folder} has neither {_LORA} nor {_NOISE}; a fully trained model is a pipeline of "
            "its own: load it with from_pretrained"
        )
    return lora, noise, whole


def _take_out(pipe: Any) -> None:
    """Take the LoRA and the scheduler of an earlier call out of a pipeline, if there are any."""
    own, given = getattr(pipe, "_tuned_schedulers", None) or (None, None)
    if given is not None and pipe.scheduler is given:
        pipe.scheduler = own
    adapter = getattr(pipe, "_tuned_adapter", None)
    if adapter is not None:
        pipe.delete_adapters(adapter)
        pipe._tuned_adapter = None
    if getattr(pipe, "_tuned_pretrained", None) is not None:
        _switch_off(pipe)
        pipe._tuned_pretrained = pipe._tuned_whole = None


def _swap(pipe: Any, told: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Give a pipeline the scheduler that takes the steps of the run; return both.

    One of another class than the model's is the user's choice, and stays.
    """
    own, name, options = pipe.scheduler, told.get("class"), told.get("options") or {}
    if (
        name is None
        or type(own).__name__ != told["model"]
        or (name == told["model"] and not options)
    ):
        return None
    kind = getattr(sys.modules["diffusers"], name)  # the caller has imported it
    pipe.scheduler = kind.from_config(own.config, **options)
    return own, pipe.scheduler


def _put_in(pipe: Any, folder: Path) -> str:
    """Load a LoRA beside the ones that are there; return its name."""
    known = {name for names in pipe.get_list_adapters().values() for name in names}
    name = next(own for i in count() if (own := f"tuned_{i}") not in known)
    pipe.load_lora_weights(folder, adapter_name=name)
    return name


def _exchanged(pipe: Any, folder: Path) -> tuple[str, nn.Module]:
    """Put the trained denoiser in a pipeline; return the name and the denoiser that was there."""
    name = "transformer" if getattr(pipe, "unet", None) is None else "unet"
    own = getattr(pipe, name)
    setattr(pipe, name, type(own).from_pretrained(folder / name).to(own.device, own.dtype))
    return name, own


def _shares(card: Mapping[str, Any]) -> tuple[float, float]:
    """Return the shares of the first and of the last steps that the LoRA was not tuned for."""
    total, first = card["num_steps"], card.get("skipped_steps", 0)
    return first / total, (total - first - card["tuned_steps"]) / total


class _Tuned:
    """Mixed into a pipeline's class; everything else is the pipeline's own."""

    _tuned_shares: tuple[float, float]
    _tuned_num_steps: int
    _tuned_begin: int
    _tuned_steps: int
    _tuned_length: int | None
    _tuned_noise: NoiseGenerator | None
    _tuned_adapter: str | None
    _tuned_pretrained: tuple[str, nn.Module] | None
    _tuned_whole: nn.Module | None
    _tuned_off: list[tuple[dict[str, float], float]] | None
    _tuned_schedulers: tuple[Any, Any] | None
    _tuned_eta: float

    def __call__(self, *args: Any, **settings: Any) -> Any:
        signature = inspect.signature(super().__call__)  # type: ignore[misc]
        signature.bind_partial(*args, **settings)  # a TypeError where the call would raise one
        parameters = signature.parameters
        settings = {**dict(zip(parameters, args, strict=False)), **settings}
        prompt = settings.get("prompt")  # it is the second one of FLUX.2
        lists = (settings.get(name) for name in ("timesteps", "sigmas"))
        given = [levels for levels in lists if levels is not None]
        num_steps = settings.setdefault("num_inference_steps", self._tuned_num_steps)
        num_steps = len(given[0]) if given else num_steps
        if self._tuned_eta and "eta" in parameters:
            settings.setdefault("eta", self._tuned_eta)
        if self._tuned_length is not None:
            settings.setdefault("max_sequence_length", self._tuned_length)
        if self._tuned_noise is not None and settings.get("latents") is None:
            settings["latents"] = _latents(self, self._tuned_noise, prompt, settings)
        self._tuned_begin, self._tuned_steps = 0, num_steps
        first, last = _part(self._tuned_shares, num_steps)
        if (first, last) == (0, num_steps):
            return super().__call__(**settings)  # type: ignore[misc]
        if first >= last:
            named = (
                "the list of timesteps or sigmas" if given else f"num_inference_steps {num_steps}"
            )
            raise UsageError(f"{named} leaves no step to the tuned model")
        further = settings.get("callback_on_step_end")
        tensors = getattr(further, "tensor_inputs", None)  # diffusers asks its own callbacks
        if tensors is not None:
            settings["callback_on_step_end_tensor_inputs"] = tensors
        settings["callback_on_step_end"] = _switch(self._tuned_shares, num_steps, further)
        try:
            if first:
                _switch_off(self)
            return super().__call__(**settings)  # type: ignore[misc]
        finally:
            _switch_on(self)

    def get_timesteps(self, *args: Any, **settings: Any) -> Any:
        """Return the last timesteps, which pipelines that begin with a picture take alone."""
        timesteps, number = super().get_timesteps(*args, **settings)  # type: ignore[misc]
        plan = _plan(self.scheduler, self._tuned_shares, self._tuned_steps)  # type: ignore[attr-defined]
        self._tuned_begin = len(plan) - len(timesteps)
        begins_off = plan[self._tuned_begin :][:1] == [False]
        (_switch_off if begins_off else _switch_on)(self)
        return timesteps, number


def _switch_off(pipe: Any) -> None:
    """Have the pretrained denoiser run; other LoRAs than the tuned model's stay as they are."""
    if pipe._tuned_pretrained is not None and pipe._tuned_whole is None:
        name, pretrained = pipe._tuned_pretrained
        pipe._tuned_whole = getattr(pipe, name)  # the user may have compiled or moved it
        where = pipe._execution_device, pipe._tuned_whole.dtype
        if (pretrained.device, pretrained.dtype) != where:
            pretrained.to(*where)
        setattr(pipe, name, pretrained)
    if pipe._tuned_adapter is None or pipe._tuned_off is not None:
        return
    pipe._tuned_off = []
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers: list[Any] = [layer for part in parts for layer in part.modules()]
    for layer in layers:
        scales = getattr(layer, "scaling", None)
        if not isinstance(scales, dict) or pipe._tuned_adapter not in scales:
            continue
        if getattr(layer, "merged", False):  # by fuse_lora
            layer.unmerge()
        pipe._tuned_off.append((scales, scales[pipe._tuned_adapter]))
        scales[pipe._tuned_adapter] = 0.0


def _switch_on(pipe: Any) -> None:
    """Have the tuned denoiser run, its LoRA as strong as before `_switch_off`."""
    if pipe._tuned_whole is not None:
        setattr(pipe, pipe._tuned_pretrained[0], pipe._tuned_whole)
        pipe._tuned_whole = None
    for scales, own in pipe._tuned_off or ():
        scales[pipe._tuned_adapter] = own
    pipe._tuned_off = None


def _part(shares: tuple[float, float], num_steps: int) -> tuple[int, int]:
    """Return the first step of a LoRA, and the one after its last."""
    before, after = (steps_of_share(share, num_steps) for share in shares)
    return before, num_steps - after


def _switch(
    shares: tuple[float, float],
    num_steps: int,
    further: Callable[..., dict[str, Any]] | None,
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """Return a callback that has the LoRA on for its steps, and calls a further one.

    Args:
        shares: Of the first and of the last steps, which are not the LoRA's.
        num_steps: Number of the sampler's steps.
        further: The further callback.
    """
    plan: list[bool] = []

    def on_step_end(pipe: Any, call: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not call:  # the scheduler has its timesteps only once the pipeline runs
            plan[:] = _plan(pipe.scheduler, shares, num_steps)
        now, following, *_ = [*plan[call + pipe._tuned_begin :][:2], True, True]
        if following and not now:
            _switch_on(pipe)
        if now and not following:
            _switch_off(pipe)
        return tensors if further is None else further(pipe, call, t, tensors)

    return on_step_end


def _plan(scheduler: Any, shares: tuple[float, float], num_steps: int) -> list[bool]:
    """Return whether the LoRA is on, for each time that a scheduler has the denoiser called.

    Some call it more than once a step, at the timestep of the step, at the next one or in between.
    The LoRA is on from the timestep of its first step down to that of the first step after it,
    which was not tuned.
    """
    timesteps = [float(t) for t in scheduler.timesteps]
    if len(timesteps) == num_steps:
        first, last = _part(shares, num_steps)
        return [first <= i < last for i in range(num_steps)]
    starts = timesteps[:: getattr(scheduler, "order", 1)]
    if len(starts) != num_steps:  # PNDM, whose Runge-Kutta steps are further timesteps
        own = getattr(scheduler, "_timesteps", starts)
        starts = sorted({float(t) for t in own}, reverse=True)
    first, last = _part(shares, len(starts))
    below = starts[last] if last < len(starts) else float("-inf")
    return [below < t <= starts[first] for t in timesteps]


@torch.no_grad()
def _latents(pipe: Any, noise: NoiseGenerator, prompt: Any, settings: dict[str, Any]) -> Tensor:
    """Draw initial noise for the prompts of a call, `num_images_per_prompt` of each."""
    if prompt is None:
        raise UsageError("the tuned model's prior needs the prompt itself; give prompt, or latents")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    given = {"max_sequence_length": settings.get("max_sequence_length")}
    given = {name: value for name, value in given.items() if value is not None}
    encoded = _encode(pipe, prompts, **given)
    if sum(part.shape[-1] for part in encoded) != noise.policy.num_features:
        encoded = encoded[:1]  # the generator says what is wrong
    reads_tokens = noise.policy.heads > 0
    features = tokens_of(encoded) if reads_tokens else torch.cat([*map(pooled, encoded)], dim=1)
    features = features.repeat_interleave(settings.get("num_images_per_prompt") or 1, dim=0)
    latents = noise.to(features.device)(features, settings.get("generator"))
    if getattr(pipe, "unet", None) is not None:  # other pipelines give latents a dtype themselves
        latents = latents.to(encoded[0].dtype)
    packed = type(pipe).__name__ == "FluxPipeline"  # FLUX.2's packs what it is given
    return pipe._pack_latents(latents, *latents.shape) if packed else latents


def _encode(pipe: Any, prompts: list[str], **settings: Any) -> list[Tensor]:
    """Return the encodings of prompts that a prior was conditioned on."""
    name = type(pipe).__name__
    if name not in _ENCODINGS:
        raise UsageError(f"a {name} has no known prompt encodings; known: {', '.join(_ENCODINGS)}")
    if name in ("FluxPipeline", "Flux2KleinPipeline"):
        encoded = pipe.encode_prompt(prompts, **settings)
    elif name == "StableDiffusion3Pipeline":
        encoded = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **settings
        )
    elif name == "ZImagePipeline":
        captions, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **settings)
        encoded = (filled(captions, settings.get("max_sequence_length", 512)),)
    elif name == "SanaPipeline":
        call = inspect.signature(super(_Tuned, pipe).__call__).parameters
        told = {"complex_human_instruction": call["complex_human_instruction"].default}
        embedding, mask, _, _ = pipe.encode_prompt(prompts, False, **told, **settings)
        encoded = (masked(embedding, mask),)
    elif name == "StableDiffusionXLPipeline":
        encoded = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    else:
        encoded = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
    return [encoded[i] for i in _ENCODINGS[name]]
