"""What checkpoints hold: what was trained, nothing that was frozen, nothing that is run."""

import copy
from collections.abc import Callable
from functools import partial
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
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.callbacks.ema import EMA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRaFT, DRTune
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import BestOfM
from lit_rlft.core.settings import settings
from lit_rlft.core.window import SlidingWindow
from lit_rlft.loop.checkpoint import check_file, fingerprint
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.settings import changes
from tests.algorithms.inverse_noise_correction_support import Biased, points, tuner_of
from tests.support import assert_equal, trainer_of

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
    with pytest.raises(UsageError, match="there is no file"):
        check_file(str(tmp_path / "missing.ckpt"))
    torch.save([1], tmp_path / "list.ckpt")
    torch.save(Path("code"), tmp_path / "code.ckpt")
    (tmp_path / "empty.ckpt").write_text("")
    for name in ("list", "code", "empty"):
        with pytest.raises(UsageError, match="is no checkpoint of lit-rlft"):
            check_file(str(tmp_path / f"{name}.ckpt"))


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def tiny() -> PGRAFT:
    lora = LoRA(rank=2, alpha=3)
    return PGRAFT(GaussianMixturePipeline(), Coordinate(), sampler=STEPS, lora=lora, cut=0.5)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a run of P-GRAFT."""
    folder = tmp_path_factory.mktemp("held")
    trained(tiny(), folder)
    return folder / "file.ckpt"


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", "load_from_checkpoint"])
def test_no_way_of_loading_runs_what_a_file_holds(held: Path, tmp_path: Path, stage: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "bomb.ckpt"
    torch.save(torch.load(held, weights_only=True) | {"bomb": Bomb(trap)}, path)
    with pytest.raises(UsageError, match="never loaded"):
        if stage == "load_from_checkpoint":
            parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
            PGRAFT.load_from_checkpoint(path, weights_only=False, **parts)
        else:
            run = getattr(trainer_of(default_root_dir=tmp_path), stage)
            data = MixtureData(num_train=8, batch_size=8, num_val=2, num_test=2)
            run(tiny(), datamodule=data, ckpt_path=str(path), weights_only=False)
    assert not trap.exists()


def test_a_callbacks_best_model_is_loaded_no_less_safely(held: Path, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "bomb.ckpt"
    torch.save(torch.load(held, weights_only=True) | {"bomb": Bomb(trap)}, path)
    best = ModelCheckpoint(tmp_path)
    best.best_model_path = str(path)
    trainer = trainer_of(callbacks=[best], enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(UsageError, match="never loaded"):
        trainer.test(tiny(), MixtureData(num_test=2), ckpt_path="best", weights_only=False)
    assert not trap.exists()


def drawn(tuner: RewardFineTuner) -> torch.Tensor:
    condition = tuner.pipeline.example().repeat(4)
    seeds = [1, 2, 3, 4]
    (x_0,) = tuner.rollouts.draw(tuner.route(), condition, seeds, keep=[STEPS.num_steps])
    return x_0


def test_a_checkpoint_gives_the_tuned_model_without_a_trainer(held: Path, tmp_path: Path) -> None:
    original = tiny()
    trained(original, tmp_path)
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    loaded = PGRAFT.load_from_checkpoint(held, **parts)
    assert (loaded.cut, loaded.sampler, loaded.lora) == (0.5, STEPS, LoRA(rank=2, alpha=3))
    assert loaded.num_rounds == 1 and not loaded.training
    original.eval()
    assert_equal(drawn(loaded), drawn(original))
    fresh = tiny()
    fresh.setup("predict")
    assert not torch.equal(drawn(fresh), drawn(loaded))


def test_words_and_windows_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Text was left out: the sampler took other steps, and an adapter had another precision."""
    sampler, window = Sampler(3, 0.7, "flow_sde"), SlidingWindow(size=1, interval=2)
    lora = LoRA(rank=2, dtype="bfloat16")
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    trained(DDPO(**parts, sampler=sampler, sliding=window, lora=lora), tmp_path)
    parts["pipeline"] = GaussianMixturePipeline()
    loaded = DDPO.load_from_checkpoint(tmp_path / "file.ckpt", **parts)
    assert (loaded.sampler, loaded.sliding) == (sampler, window)
    assert loaded.lora is not None and loaded.lora.dtype == "bfloat16"


def test_windows_of_earlier_versions_move_on_as_they_did(tmp_path: Path) -> None:
    """They knew neither `order` nor `until`; those of now are read again."""
    window = SlidingWindow(size=1, interval=2, order="random", until=0.5)
    sampler = Sampler(3, 0.8, "cps")
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    content = trained(DDPO(**parts, sampler=sampler, sliding=window), tmp_path)
    path = tmp_path / "file.ckpt"
    parts["pipeline"] = GaussianMixturePipeline()
    loaded = DDPO.load_from_checkpoint(path, **parts)
    assert (loaded.sampler, loaded.sliding) == (sampler, window)
    known = content["lit_rlft"]["settings"]
    for name in ("order", "until"):
        del known[f"model.sliding.{name}"]
    torch.save(content, path)
    parts["pipeline"] = GaussianMixturePipeline()
    assert DDPO.load_from_checkpoint(path, **parts).sliding == SlidingWindow(size=1, interval=2)


class Asked(PGRAFT):
    """An algorithm of one's own, with a secret."""

    def __init__(self, *, token: str = "", **init_args: Any) -> None:
        super().__init__(**init_args)
        self.token = token


def test_what_a_checkpoint_hides_is_no_argument(tmp_path: Path) -> None:
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    trained(Asked(**parts, sampler=STEPS, lora=LoRA(rank=2), cut=0.5, token="abc"), tmp_path)
    parts["pipeline"] = GaussianMixturePipeline()
    assert Asked.load_from_checkpoint(tmp_path / "file.ckpt", **parts).token == ""


def test_a_checkpoint_with_an_average_gives_the_average(tmp_path: Path) -> None:
    average = EMA(decay=0.5)
    trained(tiny(), tmp_path, callbacks=[average])
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    loaded = PGRAFT.load_from_checkpoint(tmp_path / "file.ckpt", **parts)
    assert_equal([p.data for p in loaded._trained().values()], average.average)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"pipeline": GaussianMixturePipeline(residual_width=8)}, "tuned from other weights"),
        ({"lora": LoRA(rank=3)}, "holds other trained weights"),
        ({"lora": LoRA(rank=2, alpha=4)}, "LoRA of alpha 3, not 4"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    held: Path, other: dict[str, Any], reason: str
) -> None:
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()} | other
    with pytest.raises(UsageError, match=f"^the checkpoint .*{reason}"):
        PGRAFT.load_from_checkpoint(held, **parts)
    with pytest.raises(UsageError, match="needs reward="):
        PGRAFT.load_from_checkpoint(held, pipeline=GaussianMixturePipeline())


def test_hyper_parameters_of_a_file_are_not_used(held: Path, tmp_path: Path) -> None:
    content = torch.load(held, weights_only=True)
    content["hyper_parameters"] = {"_instantiator": "nowhere.make", "cut": 0.9, "seed": 7}
    torch.save(content, tmp_path / "file.ckpt")
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    loaded = PGRAFT.load_from_checkpoint(tmp_path / "file.ckpt", **parts)
    assert (loaded.cut, loaded.seed) == (0.5, 0)


def test_a_copy_of_a_tuner_does_not_take_the_trainer_along(tmp_path: Path) -> None:
    tuner = tiny()
    trained(tuner, tmp_path)
    tuner.eval()
    twin = copy.deepcopy(tuner)
    assert twin.audience.trainer is None and twin._trainer is None
    assert_equal(drawn(twin), drawn(tuner))
    assert tuner.audience.trainer is not None


def test_settings_are_plain_and_tell_objects_apart() -> None:
    first, second = settings(tiny(), "model", ("pipeline",)), settings(tiny(), "model")
    assert all(isinstance(v, bool | int | float | str | None) for v in first.values())
    assert first["model.sampler.num_steps"] == 2 and first["model.lora.alpha"] == 3
    assert first["model.reward"].endswith("Coordinate")
    assert changes(first, second) == []
    other = PGRAFT(GaussianMixturePipeline(), Judged(), sampler=Sampler(num_steps=5), cut=0.5)
    keys = [key for key, *_ in changes(first, settings(other, "model"))]
    assert keys == ["model.lora", "model.reward", "model.sampler.num_steps"]


@pytest.mark.parametrize(
    "make",
    [
        partial(GRAFT, num_candidates=2),
        partial(GRAFT, num_candidates=2, iterative=True, selection=BestOfM()),
        partial(RewardGradient, method=DRaFT(2)),
        partial(RewardGradient, method=DRTune(k=1, m=2)),
    ],
    ids=["GRAFT", "RAFT", "DRaFT", "DRTune"],
)
def test_arguments_that_a_class_gives_to_its_base_are_not_given_twice(
    make: Any, tmp_path: Path
) -> None:
    """GRAFT is P-GRAFT with a cut of 0; a reward gradient's method is checked before it is used."""
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Coordinate()}
    original = make(**parts, sampler=Sampler(3), lora=LoRA(rank=2, alpha=3))
    trained(original, tmp_path)
    parts["pipeline"] = GaussianMixturePipeline()
    loaded = make.func.load_from_checkpoint(tmp_path / "file.ckpt", **parts)
    original.eval()
    seeds, condition = [1, 2, 3, 4], original.pipeline.example().repeat(4)
    found = [
        tuner.rollouts.draw(tuner.route(), condition, seeds, keep=[3])[0]
        for tuner in (original, loaded)
    ]
    assert_equal(*found)
    if isinstance(original, RewardGradient):
        assert vars(loaded.method) == vars(original.method)


@pytest.mark.parametrize("make", [tiny, lambda: tuner_of(Biased())])
def test_what_is_fitted_again_is_tested_as_trained(
    make: Callable[[], RewardFineTuner], tmp_path: Path
) -> None:
    tuner = make()
    tuner.as_trained = False  # as after a test with other settings
    trainer_of(default_root_dir=tmp_path).fit(tuner, points(num=4))
    assert tuner.as_trained
