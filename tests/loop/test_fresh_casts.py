"""Under mixed precision each update sees the weights that the one before has left."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch._dynamo.testing import CompileCounter

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.core.advantage import BatchAdvantage
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.precision import fresh_casts
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of


class TanhNetwork(torch.nn.Linear):
    """A layer that torch compiles."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


class Keeping(MixedPrecision):
    """Lets autocast keep its casts of weights, as Lightning 2.5 does, or not."""

    def __init__(self, keeps: bool) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.keeps = keeps

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=self.keeps)


def fitted(folder: Path, keeps: bool) -> tuple[float, torch.Tensor]:
    """Return how far ratios went from 1 in a round of four updates, and the weights after it."""
    torch.manual_seed(0)
    tuner = DDPO(
        GaussianMixturePipeline(),
        Coordinate(),
        sampler=Sampler(4, 1.0),
        lora=LoRA(rank=2),
        advantage=BatchAdvantage(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        num_epochs=2,
        minibatch_size=16,
    )
    trainer = trainer_of(default_root_dir=folder, plugins=[Keeping(keeps)])
    trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
    weights = [own.detach().flatten() for own in tuner._trained().values()]
    return float(trainer.callback_metrics["train/ratio_deviation_max"]), torch.cat(weights)


@pytest.mark.parametrize("cast", [False, True])
def test_a_compiled_network_is_the_same_in_rounds_and_in_validation(cast: bool) -> None:
    torch._dynamo.reset()
    counter, network = CompileCounter(), TanhNetwork()
    network.compile(backend=counter)
    given = torch.zeros(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cast, cache_enabled=not cast):
        network(given)
        with fresh_casts(given.device):
            network(given)
    assert counter.frame_count == 1


def test_casts_are_not_kept_from_one_update_to_the_next(tmp_path: Path) -> None:
    (deviation, weights), (kept_deviation, kept) = (fitted(tmp_path, k) for k in (False, True))
    assert kept_deviation == pytest.approx(deviation) and deviation > 0.01
    assert torch.equal(kept, weights)
