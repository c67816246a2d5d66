"""The closed-form pipeline: an exact denoiser whose weights are the parameters of a mixture."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from domains.gaussian_mixture.closed_form.denoiser import GaussianMixtureDenoiser, Residual
from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.render import Plane
from domains.gaussian_mixture.samples import read_point, save_points
from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, column
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, Schedule, vp_betas
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.compiled import compile_small

__all__ = ["GaussianMixtureDenoiser", "GaussianMixturePipeline", "ScheduleName"]

ScheduleName = Literal["discrete_vp", "cosine_vp", "rectified_flow"]
Compiled = Literal["whole", "graphs"]


class GaussianMixturePipeline(Pipeline):
    """A model that samples a known mixture: states and samples are points [B, d].

    Args:
        weights: [K] weights of the components, positive; normalised to sum 1.
        means: [K, d] means.
        stds: [K] standard deviations, positive.
        schedule: The noise schedule: Stable Diffusion's table of betas, the cosine schedule, or
            straight lines.
        prediction_type: What the denoiser predicts.
        residual_width: Hidden units of the network beside the mixture, which LoRA adapts and which
            lets the model leave the family of mixtures; 0 leaves it out.
        compile: "whole" has torch compile the denoiser; "graphs" also records CUDA graphs, on a
            GPU alone. None compiles nothing.

    Raises:
        UsageError: The mixture's settings do not fit together, or the schedule has a level
            without signal, from which "epsilon" tells nothing about the data.
    """

    lora_targets = ("fc1", "fc2", "fc3")
    denoiser: GaussianMixtureDenoiser
    process: GaussianProcess

    def __init__(
        self,
        weights: Sequence[float] = WEIGHTS,
        means: Sequence[Sequence[float]] = MEANS,
        stds: Sequence[float] = STDS,
        *,
        schedule: ScheduleName = "discrete_vp",
        prediction_type: PredictionType = "epsilon",
        residual_width: int = 64,
        compile: Compiled | None = None,
    ) -> None:
        super().__init__()
        one_of(self, "schedule", get_args(ScheduleName), schedule)
        one_of(self, "compile", (*get_args(Compiled), None), compile)
        self.mixture = Mixture.of(weights, means, stds, self)
        at_least(0, self, residual_width=residual_width)
        self.process = GaussianProcess(_schedule(schedule), prediction_type)
        self.denoiser = GaussianMixtureDenoiser(self.mixture, self.process, residual_width)
        self.plane = Plane(self.mixture)
        self.compile_how = compile
        self.compile_denoiser(self.denoiser)

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        compile_small(denoiser, self.compile_how)

    @property
    def name(self) -> str:
        return "gaussian_mixture"

    @property
    def device(self) -> torch.device:
        return self.denoiser.means.device

    def encode(self, batch: Batch) -> Condition:
        """Return the one condition there is, "mixture", for every row."""
        rows = torch.zeros(len(batch["index"]), dtype=torch.int64)
        return Condition(entries=[{"name": "mixture"}], tables={}, rows=rows)

    def blank(self, condition: Condition) -> Tensor:
        means = self.denoiser.means
        shape = len(condition), means.shape[1]
        return torch.empty(shape, dtype=means.dtype, device=means.device)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(tensor_of(x_t), t)

    def decode(self, x_0: State, condition: Condition) -> Tensor:
        """Return the points themselves."""
        return tensor_of(x_0)

    def render(self, samples: Any, condition: Condition) -> Tensor:
        """Return pictures of the points before the pretrained mixture, [B, 3, 64, 64]."""
        return self.plane.draw(samples)

    def states(self, batch: Batch) -> Tensor:
        """Return `batch["x_0"]`, [B, d], on the pipeline's device and in its dtype."""
        return column(batch, "x_0").to(self.device, self.denoiser.means.dtype)

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
        """Return a point [d] of a list of numbers, or of the .json file that has it."""
        return {"x_0": read_point(sample, folder, self.mixture.means.shape[1])}

    def keys(self, samples: Any, condition: Condition) -> list[Hashable]:
        """Return the number of the pretrained mixture's nearest mode."""
        return list(self.mixture.nearest(samples).tolist())

    def save(self, folder: Path) -> list[Path]:
        """Write the denoiser's mixture as `mixture.json`, under the pipeline's setting names.

        "exact" tells whether the model's distribution is this mixture. It is not once the residual
        network has moved.
        """
        mixture = self.denoiser.mixture
        residual = self.denoiser.residual
        values = {
            "weights": mixture.weights.tolist(),
            "means": mixture.means.tolist(),
            "stds": mixture.stds.tolist(),
            "exact": residual is None or not _moved(residual),
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "mixture.json"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return [path]

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write the coordinates of each point as JSON."""
        return save_points(samples, folder, names)


def _moved(residual: Residual) -> bool:
    # Also sees a LoRA: peft keeps an update's output factor at zero until it is trained.
    outputs = [p for name, p in residual.fc3.named_parameters() if "lora_A" not in name]
    return any(bool(p.any()) for p in outputs)


def _schedule(name: ScheduleName) -> Schedule:
    if name == "discrete_vp":
        return DiscreteVP(vp_betas())
    if name == "cosine_vp":
        return CosineVP()
    if name == "rectified_flow":
        return RectifiedFlow()
    raise UsageError(
        "pipeline.init_args.schedule must be discrete_vp, cosine_vp or rectified_flow, "
        f"got {name!r}"
    )
