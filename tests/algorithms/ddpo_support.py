"""What the tests of DDPO share: a toy model of every kind of process, rollouts, gradients."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.ddpo import DDPO, Rollout
from lit_rlft.core.advantage import BatchAdvantage
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process, ProductProcess
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import State, leaves
from lit_rlft.loop.experience import Experience

STEPS, CLASSES, PLACES = 4, 5, 12

FLOW, MASKED = GaussianProcess(RectifiedFlow(), "velocity"), MaskedProcess(CLASSES)

MIXED = ProductProcess({"box": FLOW, "category": MASKED})


class ToyDenoiser(nn.Module):
    """Predicts velocities [B, PLACES], logits [B, PLACES, CLASSES], or both, from all it sees."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.hidden = nn.Linear((CLASSES + 2) * PLACES + 1, 32)
        self.velocity, self.logits = nn.Linear(32, PLACES), nn.Linear(32, PLACES * CLASSES)

    def forward(self, x_t: State, t: Tensor) -> State:
        x = x_t if isinstance(x_t, dict) else {self.only: x_t}
        size, like = len(t), self.hidden.weight
        box = x.get("box", torch.zeros(size, PLACES))
        category = x.get("category", torch.zeros(size, PLACES, dtype=torch.int64))
        shown = nn.functional.one_hot(category, CLASSES + 1).flatten(1)
        seen = torch.cat([part.to(like) for part in (box, shown, t.unsqueeze(1))], dim=1)
        h = self.hidden(seen).tanh()
        out = {"box": self.velocity(h), "category": self.logits(h).view(size, PLACES, CLASSES)}
        return out if isinstance(x_t, dict) else out[self.only]

    @property
    def only(self) -> str:
        return "box" if isinstance(self.process, GaussianProcess) else "category"


class Toy(Pipeline):
    """States are samples; there are two conditions, told apart by nothing but their names."""

    name, device = "toy", torch.device("cpu")

    def __init__(self, process: Process) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = ToyDenoiser(process)
        self.process = process

    def encode(self, batch: Batch) -> Condition:
        return Condition([{"name": "a"}, {"name": "b"}], {}, batch["index"] % 2)

    def blank(self, condition: Condition) -> State:
        dtype = self.denoiser.hidden.weight.dtype
        box = torch.empty(len(condition), PLACES, dtype=dtype)
        both: State = {"box": box, "category": torch.zeros(box.shape, dtype=torch.int64)}
        return both if isinstance(self.process, ProductProcess) else both[self.denoiser.only]

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        return self.denoiser(x_t, t)

    def decode(self, x_0: State, condition: Condition) -> Any:
        return x_0

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return torch.zeros(len(condition), 3, 8, 8)


class Sum(Reward):
    """A different weight for every dimension of every field."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        parts = [leaf.flatten(1).float() for leaf in leaves(samples)]
        values = torch.cat(parts, dim=1)
        return values @ torch.linspace(0.1, 1.3, values.shape[1])


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "discrete VP": lambda: GaussianMixturePipeline(residual_width=16),
    "cosine VP": lambda: GaussianMixturePipeline(schedule="cosine_vp", prediction_type="v"),
    "flow": lambda: Toy(FLOW),
    "masked": lambda: Toy(MASKED),
    "product": lambda: Toy(MIXED),
}

each_process = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)

NUM, M = 8, 2


def tuner_of(pipeline: Pipeline | None = None, *, setup: bool = True, **settings: Any) -> DDPO:
    pipeline = pipeline or GaussianMixturePipeline(residual_width=16)
    gaussian = isinstance(pipeline, GaussianMixturePipeline)
    reward = settings.pop("reward", Coordinate() if gaussian else Sum())
    base = {"sampler": Sampler(STEPS, 1.0), "num_candidates": M, "advantage": BatchAdvantage()}
    tuner = DDPO(pipeline, reward, **{**base, **settings})
    # As much of a trainer as `collect` looks at.
    trainer: Any = SimpleNamespace(
        world_size=1,
        progress_bar_callback=None,
        is_global_zero=True,
        strategy=SingleDeviceStrategy(),
    )
    tuner.trainer = trainer
    if setup:
        tuner.setup("fit")
    return tuner


@torch.no_grad()
def collected(tuner: DDPO, num_conditions: int = NUM // M) -> Rollout:
    batch = {"index": torch.arange(num_conditions)}
    return tuner.collect(batch, tuner.pipeline.encode(batch))


def pairs_of(rollout: Rollout, size: int | None = None) -> list[Experience]:
    return [rollout.terms(rows) for rows in torch.arange(rollout.num_terms).split(size or 10**6)]


def ends_of(tuner: DDPO, t: Tensor) -> Tensor:
    """Where the sampler's steps from levels t lead, [P]."""
    process, num_steps = tuner.pipeline.process, tuner.sampler.num_steps
    steps = (process.times(num_steps)[:-1] == t.unsqueeze(1)).int().argmax(dim=1)
    return process.ends(num_steps)[steps]


def gradient(tuner: DDPO, losses: Tensor) -> Tensor:
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    zeros = (
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )
    return torch.cat([g.flatten() for g in zeros])


def replayed(tuner: DDPO, rollout: Rollout, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of the summed loss, and all ratios' largest deviation from 1."""
    outcomes = [tuner.loss(part, None) for part in pairs_of(rollout, size)]
    deviation = torch.cat([values["first_ratio_deviation_max"] for _, values in outcomes]).max()
    return gradient(tuner, torch.cat([losses for losses, _ in outcomes])), deviation


def seeded_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Pairs(Reward):
    """Tells the two candidates apart in every second group only."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.5, 0.5] * (len(samples) // 4))
