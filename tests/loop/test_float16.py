"""Training in float16: losses are scaled, steps that overflow are skipped and do not count."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.precision import tell_skipped
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

NUM_UPDATES = 2  # rounds of one update each


class Norms(Callback):
    """Keeps the gradient norms that rounds log."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        logged = trainer.callback_metrics
        self.found += [float(logged["train/grad_norm"])] if "train/grad_norm" in logged else []


def fitted(folder: Path, scaler: Any, **settings: Any) -> tuple[PGRAFT, list[float]]:
    """Return a tuner after a fit, with a scaler of losses or in single precision, and norms."""
    torch.manual_seed(0)
    tuner = PGRAFT(
        GaussianMixturePipeline(),
        Coordinate(),
        sampler=Sampler(4),
        lora=LoRA(rank=2),
        minibatch_size=64,
        **settings,
    )
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scaler else []
    norms = Norms()
    trainer = trainer_of(default_root_dir=folder, plugins=plugins, callbacks=[norms])
    trainer.fit(tuner, MixtureData(num_train=16, batch_size=8))
    return tuner, norms.found


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_have_no_scale(tmp_path: Path, fused: bool) -> None:
    """The norm is that of single precision, also where it is clipped, and steps are made."""
    optimizer = partial(torch.optim.SGD, lr=1.0, fused=fused)
    _, plain = fitted(tmp_path, None, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    clipped = {"optimizer": optimizer, "max_grad_norm": plain[0] / 2}
    tuner, norms = fitted(tmp_path, scaler, **clipped)
    assert norms[0] == pytest.approx(plain[0], rel=0.02)
    assert tuner.num_updates == NUM_UPDATES
    single, _ = fitted(tmp_path, None, **clipped)
    moved, expected = (
        torch.cat([own.detach().flatten() for name, own in each._trained().items() if "B" in name])
        for each in (tuner, single)
    )
    assert float((moved - expected).norm()) < 0.05 * float(expected.norm()) != 0


def test_the_usual_optimiser_takes_steps(tmp_path: Path) -> None:
    """The usual one, AdamW: the trainer's plugin divides its gradients by the scale, once."""
    tuner, norms = fitted(tmp_path, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert tuner.num_updates == NUM_UPDATES and len(norms) == NUM_UPDATES


def test_steps_that_overflow_are_skipped_and_do_not_count(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with pytest.warns(UserWarning, match="too large for float16: it was skipped"):
        tuner, norms = fitted(tmp_path, scaler)
    assert tuner.num_updates == 0 and tuner.num_rounds == NUM_UPDATES and norms == []
    assert scaler.get_scale() == 2.0 ** (127 - NUM_UPDATES)
    second = [own for name, own in tuner._trained().items() if "lora_B" in name]
    assert second and not any(own.any() for own in second)  # as they were made


def test_no_scale_that_is_small_enough_ends_the_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tell_skipped(2.0**-9)
    with pytest.raises(UsageError, match=r"set trainer\.precision to bf16"):
        tell_skipped(2.0**-11)
