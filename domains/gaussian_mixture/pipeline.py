"""The closed-form pipeline: an exact denoiser whose weights are the parameters of a mixture."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.render import Plane
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, column
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, Schedule, vp_betas
from lit_rlft.core.state import State, expand_as, tensor_of

__all__ = ["GaussianMixtureDenoiser", "GaussianMixturePipeline", "ScheduleName"]

ScheduleName = Literal["discrete_vp", "cosine_vp", "rectified_flow"]


class GaussianMixtureDenoiser(nn.Module):
    r"""The posterior mean of a Gaussian mixture, plus a residual network that starts at zero.

    With :math:`v_k = \alpha_t^2 s_k^2 + \sigma_t^2` and responsibilities
    :math:`\rho_k \propto w_k N(x_t; \alpha_t m_k, v_k I)`,

    .. math::
        E[x_0 \mid x_t] = \sum_k \frac{\rho_k}{v_k} (\sigma_t^2 m_k + \alpha_t s_k^2 x_t), \qquad
        E[\epsilon \mid x_t] = \sigma_t \sum_k \frac{\rho_k}{v_k} (x_t - \alpha_t m_k),

    converted to the prediction type of the process. Logits of w, means and log s are parameters,
    so full fine-tuning without a residual moves from mixture to mixture.

    Args:
        mixture: The data law that is denoised exactly.
        process: The noising process that predictions are made for.
        residual_width: Hidden units of the residual network; 0 leaves it out.
    """

    def __init__(
        self, mixture: Mixture, process: GaussianProcess, residual_width: int = 64
    ) -> None:
        super().__init__()
        self.process = process
        self.logits = nn.Parameter(mixture.weights.log().float())
        self.means = nn.Parameter(mixture.means.float())
        self.log_stds = nn.Parameter(mixture.stds.log().float())
        dims = mixture.means.shape[1]
        self.residual = Residual(dims, residual_width) if residual_width else None

    @property
    def mixture(self) -> Mixture:
        """The mixture that the parameters stand for, detached."""
        logits, log_stds = self.logits.detach(), self.log_stds.detach()
        return Mixture(logits.softmax(dim=0), self.means.detach(), log_stds.exp())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction for x_t [B, d] at times t [B]."""
        x_0, eps = self.posterior_means(x_t, t)
        prediction = self.process.prediction(x_0, eps, t)
        return prediction if self.residual is None else prediction + self.residual(x_t, t)

    def posterior_means(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x_0 | x_t] and E[eps | x_t] of the mixture; no level divides by zero."""
        schedule = self.process.schedule
        alpha, sigma = (expand_as(c, x_t) for c in (schedule.alpha(t), schedule.sigma(t)))
        data = (2 * self.log_stds).exp()
        variance = alpha**2 * data + sigma**2  # [B, K]
        offset = x_t.unsqueeze(1) - alpha.unsqueeze(-1) * self.means  # [B, K, d]
        dims = x_t.shape[1]
        log_normal = -0.5 * (offset.square().sum(dim=-1) / variance + dims * variance.log())
        pull = (self.logits + log_normal).softmax(dim=1) / variance
        x_0 = sigma**2 * (pull @ self.means) + alpha * (pull @ data).unsqueeze(1) * x_t
        eps = sigma * (pull.sum(dim=1, keepdim=True) * x_t - alpha * (pull @ self.means))
        return x_0, eps


class Residual(nn.Module):
    """A small network on (x_t, t) whose output layer is zero at the start.

    Hidden weights come from a fixed seed: two pipelines of one config are the same model.

    Args:
        dims: d, the dimensions of x_t.
        width: Units of the two hidden layers.
    """

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims + 4, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, dims)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.normal_(layer.bias, std=1.0, generator=generator)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the residual of the prediction, [B, d]."""
        clock = torch.stack([torch.cos(torch.pi * k * t) for k in range(1, 5)], dim=1)
        hidden = torch.nn.functional.silu(self.fc1(torch.cat([x_t, clock.to(x_t)], dim=1)))
        return self.fc3(torch.nn.functional.silu(self.fc2(hidden)))


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
    ) -> None:
        super().__init__()
        self.mixture = Mixture.of(weights, means, stds)
        if residual_width < 0:
            raise UsageError(
                f"pipeline.init_args.residual_width must not be negative, got {residual_width}"
            )
        self.process = GaussianProcess(_schedule(schedule), prediction_type)
        self.denoiser = GaussianMixtureDenoiser(self.mixture, self.process, residual_width)
        self.plane = Plane(self.mixture)

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
        return self.denoiser.means.new_empty(len(condition), self.denoiser.means.shape[1])

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
        return column(batch, "x_0").to(self.denoiser.means)

    def keys(self, samples: Any, condition: Condition) -> list[Hashable]:
        """Return the number of the pretrained mixture's nearest mode."""
        return list(self.mixture.nearest(samples).tolist())

    def save(self, folder: Path) -> list[Path]:
        """Write the denoiser's mixture as `mixture.json`, in the words of the pipeline's settings.

        "exact" tells whether the learned law is this mixture: it is not once the residual network
        has moved.
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
        path.write_text(json.dumps(values, indent=2) + "\n")
        return [path]

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write the coordinates of each point as JSON."""
        paths = [folder / f"{name}.json" for name in names]
        for point, path in zip(samples.tolist(), paths, strict=True):
            path.write_text(json.dumps(point) + "\n")
        return paths


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
