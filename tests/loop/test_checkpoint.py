"""What checkpoints hold: what was trained, and nothing that was frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import domains.text_to_image
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.callbacks.ema import EMA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.checkpoint import check_file, fingerprint
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

SHAPES = Path(domains.text_to_image.__file__).parent / "assets/shapes"
STEPS = Sampler(num_steps=2)


class Judged(Coordinate):
    """A reward with weights of its own, which no checkpoint should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(100, 100)
        self.register_buffer("table", torch.zeros(1000))


def trained(tuner: RewardFineTuner, folder: Path, **settings: Any) -> dict[str, Any]:
    """Train a round on the mixture and return the checkpoint."""
    fit = trainer_of(default_root_dir=folder, **settings)
    fit.fit(tuner, MixtureData(num_train=8, batch_size=8))
    fit.save_checkpoint(folder / "file.ckpt")
    return torch.load(folder / "file.ckpt", weights_only=True)


def test_frozen_weights_stay_out(tmp_path: Path) -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Judged(), sampler=STEPS, lora=LoRA(rank=2))
    names = set(trained(tuner, tmp_path)["state_dict"])
    assert len(names) == 6 and all("lora_" in name for name in names)


def test_full_fine_tuning_keeps_the_denoiser_once(tmp_path: Path) -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Judged(), sampler=STEPS)
    names = set(trained(tuner, tmp_path)["state_dict"])
    own = {f"pipeline.denoiser.{name}" for name, _ in tuner.pipeline.denoiser.named_parameters()}
    assert names == own


def test_counters_and_fingerprint_travel(tmp_path: Path) -> None:
    def fresh() -> Pretrain:
        return Pretrain(GaussianMixturePipeline(), Coordinate(), condition_dropout=0.0)

    first = fresh()
    held = trained(first, tmp_path)["lit_rlft"]
    assert held["pretrained"] == fingerprint(GaussianMixturePipeline().denoiser)
    assert (held["num_rounds"], held["num_samples"], held["num_updates"]) == (1, 8, 1)
    second = fresh()
    resumed = trainer_of(default_root_dir=tmp_path, max_epochs=2)
    data = MixtureData(num_train=8, batch_size=8)
    resumed.fit(second, data, ckpt_path=str(tmp_path / "file.ckpt"))
    assert (second.num_rounds, second.num_samples, second.num_updates) == (2, 16, 2)
    assert second.meter.training.denoiser_calls == 2 * first.meter.training.denoiser_calls
    assert second.meter.training.seconds > first.meter.training.seconds


def test_the_fingerprint_tells_weights_apart() -> None:
    first, second = (GaussianMixturePipeline().denoiser for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.means[0, 0] += 1e-3
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) != fingerprint(GaussianMixturePipeline(residual_width=8).denoiser)


def test_the_average_is_exported_and_the_raw_weights_are_kept(tmp_path: Path) -> None:
    # The one checkpoint is written at the very end, when the average is about to be exported.
    last = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    runs: dict[str, RewardFineTuner] = {}
    for name, callbacks in {"plain": [], "averaged": [EMA(decay=0.5), last]}.items():
        lora = LoRA(rank=2)
        tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=STEPS, lora=lora)
        fit = trainer_of(
            default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        fit.fit(tuner, MixtureData(num_train=16, batch_size=8))
        runs[name] = tuner
    raw = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain, averaged = (tuner.state_dict() for tuner in runs.values())
    assert all(torch.equal(plain[name], value) for name, value in raw.items())
    assert not any(torch.equal(averaged[name], raw[name]) for name in raw if "lora_B" in name)


def test_an_adapter_of_the_embedded_model_is_small(
    tmp_path: Path, tiny_stable_diffusion: Callable[..., Path]
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    config = UNet2DConditionModel.load_config(SHAPES, subfolder="unet")
    pipeline.denoiser = pipeline.diffusers.unet = UNet2DConditionModel.from_config(config)
    tuner = GRAFT(pipeline, Symmetry(), lora=LoRA(rank=8))
    fit = trainer_of(default_root_dir=tmp_path)
    fit.strategy.connect(tuner)
    tuner.trainer = fit
    tuner.setup("fit")
    optimizer = tuner.configure_optimizers()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fit.strategy.optimizers = [optimizer]
    fit.save_checkpoint(tmp_path / "file.ckpt")
    size = (tmp_path / "file.ckpt").stat().st_size
    assert 1e5 < size < 2e6
    assert torch.load(tmp_path / "file.ckpt", weights_only=True)["optimizer_states"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    check_file(None)
    check_file("last")
    with pytest.raises(UsageError, match="there is no file"):
        check_file(str(tmp_path / "missing.ckpt"))
    torch.save([1], tmp_path / "list.ckpt")
    torch.save(Path("code"), tmp_path / "code.ckpt")
    (tmp_path / "empty.ckpt").write_text("")
    for name in ("list", "code", "empty"):
        with pytest.raises(UsageError, match="is no checkpoint of lit-rlft"):
            check_file(str(tmp_path / f"{name}.ckpt"))
