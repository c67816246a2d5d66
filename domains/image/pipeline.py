"""Unconditional image models in pixel space: any `UNet2DModel` that diffusers saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from domains.image import EMBEDDED
from lit_rlft.core.checks import UsageError, one_of, positive, require
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, column
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.compiled import SmallCompiled, compile_small
from lit_rlft.kit.images import save_pictures
from lit_rlft.kit.network_folder import (
    SaveDtype,
    forget_source,
    found_variant,
    load_pretrained,
    merged,
)
from lit_rlft.kit.picture_folder import read_picture
from lit_rlft.kit.probe_pictures import probe_pictures
from lit_rlft.kit.saved_grids import SavedFlow, SavedVP, own_flow, plain_flow
from lit_rlft.kit.schedulers import saved_process
from lit_rlft.kit.shapes import output_shape
from lit_rlft.kit.whole_folder import refuse_code

__all__ = ["EMBEDDED", "ImagePipeline"]

_FLOW_LEVELS = 1000
"""A new flow's network is given t times this, diffusers' default."""
_CHANNELS = (1, 3)
_KEY = "pipeline.init_args.pretrained"
_PARTS = ("unet", "scheduler")
_ELSEWHERE = "models with conditions or latents belong to other domains"
Schedule = Literal["saved", "rectified_flow", "ddpm"]


class ImagePipeline(Pipeline):
    """A U-Net on pixels, as a rectified flow or a DDPM.

    States are images [B, C, H, W] with pixels in about [-1, 1], C = 1 or 3; samples are pictures
    [B, 3, H, W] in [0, 1], grey ones with three equal channels. There is one condition, none.

    A DDPM keeps the schedule and the prediction type that it was saved with. Its scheduler's
    `clip_sample` and `thresholding` bound the estimate of x_0 within every step.

    Args:
        pretrained: A folder or hub id of a `DDPMPipeline` (or another of diffusers' pipelines of a
            `UNet2DModel` and a scheduler), the folder of a `UNet2DModel` alone, or the name of an
            embedded model ("digits", "shapes"); None takes `architecture`.
        variant: Which files of weights to load, such as "fp16"; None takes plain ones, and of a
            folder without them its only variant.
        architecture: Arguments of a `UNet2DModel` with new weights, to pretrain it: `sample_size`,
            `in_channels`, `block_out_channels` and so on.
        schedule: "saved" takes the saved scheduler's; "rectified_flow" and "ddpm" (diffusers'
            default betas, noise predicted) are for networks that were saved without one. New
            networks are rectified flows unless "ddpm" is given.
        shift: The time shift of a new rectified flow; a saved scheduler has its own.
        save_dtype: Precision in which a model is written.
        compile: Have torch compile the denoiser's "blocks", each kind once, or the "whole" of it;
            "graphs" also records CUDA graphs, on a GPU alone. None compiles nothing.

    Raises:
        UsageError: `pretrained` was not saved by diffusers or is of another kind, or `architecture`
            is not that of a `UNet2DModel`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    denoiser: UNet2DModel
    process: GaussianProcess

    def __init__(
        self,
        pretrained: str | None = "digits",
        *,
        variant: str | None = None,
        architecture: dict[str, Any] | None = None,
        schedule: Schedule = "saved",
        shift: float = 1.0,
        save_dtype: SaveDtype = "float32",
        compile: SmallCompiled | None = None,
    ) -> None:
        super().__init__()
        one_of(self, "schedule", get_args(Schedule), schedule)
        one_of(self, "save_dtype", get_args(SaveDtype), save_dtype)
        one_of(self, "compile", (*get_args(SmallCompiled), None), compile)
        if (pretrained is None) == (architecture is None):
            raise UsageError(
                "pipeline.init_args: give either pretrained or architecture; set pretrained to "
                "null to train a network of your own"
            )
        positive(self, shift=shift)
        self.pretrained = pretrained
        if pretrained is None:
            assert architecture is not None
            self.denoiser, saved = _new(architecture), None
        else:
            self.denoiser, saved = _load(pretrained, variant)
        self.scheduler = self._scheduler_of(saved, schedule, shift)
        _check(self.denoiser)
        self.process = saved_process(self.scheduler, flows=True)
        self.save_dtype = getattr(torch, save_dtype)
        self.compile_how = compile
        self.compile_denoiser(self.denoiser)

    def _scheduler_of(self, saved: Any, schedule: Schedule, shift: float) -> Any:
        """Return the scheduler that was saved with the network, else a new one."""
        named = repr(self.pretrained)
        if saved is not None:
            rule = f"'saved': {named} has the scheduler that it was trained with"
            require(schedule == "saved", self, "schedule", rule)
        elif self.pretrained is not None:
            which = f"{named}, a network without a scheduler, was trained as"
            rule = f"'rectified_flow' or 'ddpm', whichever {which}"
            require(schedule != "saved", self, "schedule", rule)
        flow = saved is None and schedule != "ddpm"
        require(shift == 1 or flow, self, "shift", f"1 but for a new rectified flow, got {shift}")
        return _scheduler(schedule, shift) if saved is None else saved

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        compile_small(denoiser, self.compile_how)

    @property
    def name(self) -> str:
        return "image" if self.pretrained is None else Path(self.pretrained).name

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's images."""
        size = self.denoiser.config["sample_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def encode(self, batch: Batch) -> Condition:
        """Return the one condition there is, "image", for every row."""
        rows = torch.zeros(len(batch["index"]), dtype=torch.int64)
        return Condition(entries=[{"name": "image"}], tables={}, rows=rows)

    def blank(self, condition: Condition) -> Tensor:
        shape = (len(condition), self.denoiser.config["in_channels"], *self.image_size)
        return torch.empty(shape, dtype=self.denoiser.dtype, device=self.device)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        schedule = self.process.schedule
        assert isinstance(schedule, SavedVP | SavedFlow)
        return self.denoiser(tensor_of(x_t), schedule.timestep(t), return_dict=False)[0]

    def decode(self, x_0: State, condition: Condition) -> Tensor:
        """Return pictures [B, 3, H, W] in [0, 1]."""
        pictures = (tensor_of(x_0).float() / 2 + 0.5).clamp(0, 1)
        return pictures.expand(-1, 3, -1, -1)

    def states(self, batch: Batch) -> Tensor:
        """Return `batch["image"]`, uint8 [B, C, H, W], in [-1, 1].

        Raises:
            UsageError: The data have other channels or another size than the model.
        """
        images = column(batch, "image")
        own = (self.denoiser.config["in_channels"], *self.image_size)
        if tuple(images.shape[1:]) != own:
            raise UsageError(
                f"the data have images {list(images.shape[1:])}, the model {self.name!r} has "
                f"{list(own)} (channels, height, width); set size and channels of "
                "data.init_args.source to the model's"
            )
        return images.to(self.device, self.denoiser.dtype) / 127.5 - 1

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
        """Return the pixels of a picture's file, at the model's size."""
        channels = self.denoiser.config["in_channels"]
        return {"image": read_picture(sample, folder, self.image_size, channels)}

    def probes(self) -> tuple[Tensor, Condition]:
        pictures = probe_pictures(*self.image_size).to(self.device)
        if self.denoiser.config["in_channels"] == 1:
            pictures = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        return pictures, self.encode({"index": torch.arange(len(pictures))})

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return samples

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return nothing: all samples have the same condition."""
        return ""

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write each sample as PNG."""
        return save_pictures(samples, folder, names)

    def save(self, folder: Path) -> list[Path]:
        """Write a `DDPMPipeline` folder, a LoRA merged into the weights.

        A flow's scheduler is written so that diffusers lays the grid that was sampled last, for
        the same number of steps. Read again here, it lays the model's own for any number.
        """
        plain, schedule = merged(self.denoiser).to(self.save_dtype), self.process.schedule
        scheduler = self.scheduler
        if isinstance(schedule, SavedFlow):
            scheduler = plain_flow(scheduler, schedule)
        DDPMPipeline(unet=plain, scheduler=scheduler).save_pretrained(folder)
        forget_source(folder)
        return [folder]


def _new(architecture: dict[str, Any]) -> UNet2DModel:
    try:
        return UNet2DModel(**architecture)
    except (TypeError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"pipeline.init_args.architecture is none of a UNet2DModel ({reason}); give its "
            "arguments, such as sample_size, in_channels, out_channels and block_out_channels"
        ) from error


def _scheduler(schedule: str, shift: float = 1.0) -> Any:
    if schedule == "ddpm":
        # Clipping is left to folders that ask for it: clipped steps have no inverse.
        return DDPMScheduler(clip_sample=False)
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=_FLOW_LEVELS, shift=shift)


def _read(source: str, variant: str | None) -> tuple[UNet2DModel, Any]:
    folder = Path(source)
    if (folder / "config.json").is_file():  # a network alone
        kind = UNet2DModel.load_config(source).get("_class_name", UNet2DModel.__name__)
        if kind != UNet2DModel.__name__:
            raise UsageError(f"{_KEY}: {source!r} has a {kind}, not a UNet2DModel; {_ELSEWHERE}")
        return UNet2DModel.from_pretrained(source, variant=variant or found_variant(folder)), None
    index = DDPMPipeline.load_config(source)
    refuse_code(index, source, _KEY)
    if odd := [name for name in index if name not in _PARTS and _is_part(index[name])]:
        raise UsageError(
            f"{_KEY}: {source!r}, a {index.get('_class_name')}, has a {odd[0]} beside its U-Net "
            f"and scheduler; {_ELSEWHERE}"
        )
    if variant is None and folder.is_dir():
        variant = found_variant(folder, ("unet",))
    # A DDIMPipeline turns its scheduler into a DDIM one, as anyone who loads the folder gets it.
    ddim = index.get("_class_name") == "DDIMPipeline"
    loaded = (DDIMPipeline if ddim else DDPMPipeline).from_pretrained(source, variant=variant)
    return loaded.unet, loaded.scheduler


def _is_part(entry: Any) -> bool:
    """Return whether an entry of model_index.json is a part of the pipeline: library and class."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _load(pretrained: str, variant: str | None) -> tuple[UNet2DModel, Any]:
    """Return the network and the scheduler it was saved with, None without one."""
    denoiser, scheduler = load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: _read(source, variant),
        kind="a DDPMPipeline or a UNet2DModel",
        give="'digits', 'shapes', a folder that save_pretrained wrote or a hub id",
    )
    if not isinstance(denoiser, UNet2DModel):
        raise UsageError(
            f"{_KEY}: {pretrained!r} has a {type(denoiser).__name__}, not a UNet2DModel; "
            f"{_ELSEWHERE}"
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = own_flow(scheduler)
    return denoiser.float(), scheduler


def _check(denoiser: UNet2DModel) -> None:
    config = denoiser.config
    if config["in_channels"] not in _CHANNELS or config["out_channels"] != config["in_channels"]:
        raise UsageError(
            f"pipeline.init_args: a U-Net from {config['in_channels']} to "
            f"{config['out_channels']} channels is no model of images alone; give one with 1 or 3 "
            "of both"
        )
    if config["sample_size"] is None:
        raise UsageError(
            "pipeline.init_args: the U-Net has no sample_size; give it one, in its config.json or "
            "in architecture"
        )
    if denoiser.class_embedding is not None:
        raise UsageError(
            "pipeline.init_args: the U-Net is conditioned on classes; give an unconditional one"
        )
    size = config["sample_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    images = (1, config["in_channels"], *size)
    sentence = f"pipeline.init_args: the U-Net cannot be called with images {list(images)}"
    shape = output_shape(denoiser, images, torch.zeros(1, dtype=torch.int64), sentence=sentence)
    if shape is not None and tuple(shape) != images:
        raise UsageError(f"{sentence}: it returns {list(shape)}")
