"""Pretraining: the mixture is found again from its samples; what else is trained, and what not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Coverage
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.callbacks.ema import EMA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP
from lit_rlft.kit.data import collate
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

START = {"weights": [1.0] * 5, "means": [[0.6 * x, 0.6 * y] for x, y in MEANS], "stds": [0.4] * 5}
PROMPTS = ["a ring", "a red cross", "two circles", "a ring"]


class Brightness(Reward):
    """Mean of the pixels."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples.mean(dim=(1, 2, 3))


def mixture(**settings: Any) -> GaussianMixturePipeline:
    plain = {"schedule": "rectified_flow", "prediction_type": "velocity", "residual_width": 0}
    return GaussianMixturePipeline(**{**plain, **settings})


def tuner_of(pipeline: Pipeline, reward: Reward | None = None, **settings: Any) -> Pretrain:
    settings = {"condition_dropout": 0.0, "sampler": Sampler(4), **settings}
    return Pretrain(pipeline, reward or Coordinate(), **settings)


def fit(tuner: Pretrain, data: Any, folder: Path, num_epochs: int = 1, **trainer: Any) -> None:
    trainer_of(max_epochs=num_epochs, default_root_dir=folder, **trainer).fit(tuner, data)


def pictures(num: int = 4) -> DataLoader[dict[str, Any]]:
    images = torch.randint(0, 256, (num, 3, 16, 16), dtype=torch.uint8)
    rows = [{"index": i, "prompt": PROMPTS[i % 4], "image": images[i]} for i in range(num)]
    return DataLoader(rows, batch_size=num, collate_fn=collate)  # type: ignore[arg-type]


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(before: dict[str, Tensor], module: torch.nn.Module) -> bool:
    return all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@torch.no_grad()
def excess_loss(pipeline: GaussianMixturePipeline, num: int = 20_000) -> tuple[float, float]:
    """Mean loss above the exact denoiser's on fresh data, same noise, and its standard error."""
    exact = mixture()
    torch.manual_seed(7)
    x_0 = exact.mixture.sample(num).float()
    t = exact.process.draw_times(torch.rand(num))
    s = torch.zeros_like(t)
    x_t = exact.process.noised(x_0, s, t)
    condition = exact.encode({"index": torch.arange(num)})
    losses, least = (
        p.process.loss(p.predict(x_t, t, condition), x_0, x_t, s, t) for p in (pipeline, exact)
    )
    excess = losses - least
    return float(excess.mean()), float(excess.std() / num**0.5)


def test_a_mixture_is_found_from_its_samples(tmp_path: Path) -> None:
    """The loss comes to within 2 % of the exact denoiser's, by the distance at the start."""
    pipeline = mixture(**START)
    before, _ = excess_loss(pipeline)
    tuner = tuner_of(
        pipeline,
        minibatch_size=256,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        lr_scheduler=lambda o: CosineAnnealingLR(o, T_max=24 * 8),
    )
    losses: list[float] = []

    class Losses(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    fit(tuner, MixtureData(num_train=2048, batch_size=256), tmp_path, 24, callbacks=[Losses()])
    assert tuner.num_updates == tuner.num_rounds == 24 * 8 and tuner.num_samples == 24 * 2048
    after, error = excess_loss(pipeline)
    assert before > 0.02 and after < 0.02 * before + 4 * error
    assert np.mean(losses[-3:]) < np.mean(losses[:1])
    found = pipeline.denoiser.mixture
    # Weights within 4 errors of the sample's own shares; means within 4 errors plus 0.02.
    share = np.array(WEIGHTS)
    error = np.sqrt(share * (1 - share) / 2048)
    assert (np.abs(found.weights.numpy() - share) < 4 * error).all()
    error = np.array(STDS) / np.sqrt(2048 * share)
    assert (np.abs(found.means.numpy() - MEANS).max(axis=1) < 4 * error + 0.02).all()
    assert np.abs(found.stds.numpy() / STDS - 1).max() < 0.15


def test_loss_is_the_native_one_at_the_seeds_noise(tmp_path: Path) -> None:
    pipeline = mixture(**START)
    tuner = tuner_of(pipeline, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = MixtureData(num_train=8, batch_size=8)
    fit(tuner, data, tmp_path)
    batch = next(iter(data.train_dataloader()))
    experience = tuner.collect(batch, pipeline.encode(batch))
    assert torch.equal(experience.states["x_0"], batch["x_0"])
    losses, _ = tuner.loss(experience, generators(range(8)))
    for i, seed in enumerate(range(8)):
        rows = generators([seed])
        uniform = torch.rand((), generator=rows[0])
        t, x_0 = 1 - uniform.double().reshape(1), batch["x_0"][i : i + 1]
        noise = torch.randn(2, generator=rows[0])
        x_t = ((1 - t) * x_0 + t * noise).float()
        prediction = pipeline.predict(x_t, t, experience.condition.index(slice(0, 1)))
        torch.testing.assert_close(losses[i], (prediction - (noise - x_0)).square().mean())


def test_every_pass_draws_new_noise(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    pipeline = mixture()
    pipeline.denoiser.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    fit(tuner_of(pipeline, num_epochs=2), MixtureData(num_train=8, batch_size=8), tmp_path, 2)
    times = torch.cat(seen)
    assert len(times) == 2 * 2 * 8 == len(times.unique())


def test_average_of_the_weights_is_the_one_by_hand(tmp_path: Path) -> None:
    """a_1 = w_1, a_n = d_n a_(n-1) + (1 - d_n) w_n with d_n = min(decay, (1 + n) / (10 + n))."""
    decay, raw = 0.4, []

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            raw.append(weights_of(pl_module.pipeline.denoiser))

    pipeline, ema = mixture(**START), EMA(decay)
    tuner = tuner_of(pipeline, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    fit(tuner, MixtureData(num_train=48, batch_size=8), tmp_path, 2, callbacks=[Weights(), ema])
    assert len(raw) == 12 and not torch.equal(raw[0]["means"], raw[-1]["means"])
    for name, left_in_the_model in pipeline.denoiser.state_dict().items():
        average = raw[0][name].double()
        for n, weights in enumerate(raw[1:], start=2):
            d = min(decay, (1 + n) / (10 + n))
            average = d * average + (1 - d) * weights[name]
        torch.testing.assert_close(left_in_the_model, average.float())
        assert not torch.allclose(left_in_the_model, raw[-1][name], rtol=1e-6, atol=1e-7)


def test_evaluation_sees_the_average_and_training_goes_on_from_the_weights() -> None:
    tuner, ema, trainer = tuner_of(mixture()), EMA(0.5), Trainer(logger=False, accelerator="cpu")
    means = tuner.pipeline.denoiser.means
    for value in (0.0, 1.0, 2.0):
        means.data.fill_(value)
        ema.on_train_batch_end(trainer, tuner, None, None, 0)
    average = 4 / 13 * (3 / 12 * 0.0 + 9 / 12 * 1.0) + 9 / 13 * 2.0
    ema.on_validation_start(trainer, tuner)
    torch.testing.assert_close(means.data, torch.full_like(means, average))
    ema.on_validation_end(trainer, tuner)
    assert (means == 2.0).all()
    restored = EMA(0.5)
    restored.load_state_dict(ema.state_dict())
    restored.on_test_start(trainer, tuner)
    torch.testing.assert_close(means.data, torch.full_like(means, average))
    with pytest.raises(UsageError, match="decay"):
        EMA(1.0)


def test_conditions_are_dropped_as_often_as_asked(
    tiny_stable_diffusion: Any, tmp_path: Path
) -> None:
    """A binomial share within 4 standard errors; the others keep their own condition."""
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), negative_prompt="nothing")
    rows: list[Tensor] = []
    predict = pipeline.predict

    def recorded(x_t: Any, t: Tensor, condition: Condition) -> Tensor:
        rows.append(condition.rows)
        return predict(x_t, t, condition)

    pipeline.predict = recorded  # type: ignore[method-assign]
    settings = {"condition_dropout": 0.3, "minibatch_size": 50, "cache_states": True}
    tuner = tuner_of(pipeline, Brightness(), **settings)
    fit(tuner, pictures(100), tmp_path, 8)
    seen = torch.cat(rows)
    null = 3  # after the three unique prompts
    share = (seen == null).double().mean().item()
    assert len(seen) == 800 and abs(share - 0.3) < 4 * (0.3 * 0.7 / 800) ** 0.5
    # Prompt 0 is in the data twice as often as 1 and 2.
    kept = torch.bincount(seen[seen != null], minlength=3) / (seen != null).sum()
    assert (kept - torch.tensor([0.5, 0.25, 0.25])).abs().max() < 4 * (0.25 / 560) ** 0.5


def test_domains_without_a_null_condition_cannot_drop_it(tmp_path: Path) -> None:
    tuner = tuner_of(mixture(), condition_dropout=0.5)
    with pytest.raises(UsageError, match="set condition_dropout to 0"):
        fit(tuner, MixtureData(num_train=8, batch_size=8), tmp_path)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_text_encoder_is_trained_on_request(
    tiny_stable_diffusion: Any, tmp_path: Path, train_encoder: bool
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    assert pipeline.encoder is not None
    before = {name: weights_of(m) for name, m in pipeline.named_children()}
    settings = {"train_encoder": train_encoder, "condition_dropout": 0.1, "microbatch_size": 2}
    tuner = tuner_of(pipeline, Brightness(), **settings)
    fit(tuner, pictures(), tmp_path, 2)
    assert not unchanged(before["denoiser"], pipeline.denoiser)
    assert unchanged(before["encoder"], pipeline.encoder) == (not train_encoder)
    assert unchanged(before["vae"], pipeline.vae)
    if train_encoder:
        # Gradients reached the whole encoder, through conditions encoded within the loss.
        now = weights_of(pipeline.encoder)
        moved = [name for name in now if not torch.equal(now[name], before["encoder"][name])]
        trained = [name for name, p in pipeline.encoder.named_parameters() if p.requires_grad]
        assert set(moved) == set(trained)
    saved = TextToImagePipeline(str(tmp_path / "tuned"))
    assert unchanged(weights_of(pipeline.encoder), saved.encoder)
    assert unchanged(weights_of(pipeline.denoiser), saved.denoiser)


def test_gradients_through_the_encoder_do_not_depend_on_microbatches(
    tiny_stable_diffusion: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data, encoders = pictures(), []
    for microbatch_size in (None, 1, 3):
        pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
        settings = {"train_encoder": True, "microbatch_size": microbatch_size}
        optimizer = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
        tuner = tuner_of(pipeline, Brightness(), **settings, **optimizer)
        fit(tuner, data, tmp_path / str(microbatch_size))
        encoders.append(weights_of(pipeline.encoder))
    for name, value in encoders[0].items():
        for other in encoders[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_cached_states_are_encoded_once(tiny_stable_diffusion: Any, tmp_path: Path) -> None:
    data, learned = pictures(), []
    for cache_states in (False, True):
        pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
        calls: list[int] = []
        pipeline.vae.encoder.register_forward_hook(
            lambda m, args, out, calls=calls: calls.append(len(out))
        )
        fit(tuner_of(pipeline, Brightness(), cache_states=cache_states), data, tmp_path, 3)
        assert calls == ([4] if cache_states else [4] * 3)
        learned.append(weights_of(pipeline.denoiser))
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    data = MixtureData(num_train=8, batch_size=8)
    with pytest.raises(UsageError, match="lora to null"):
        fit(tuner_of(mixture(residual_width=8), lora=LoRA()), data, tmp_path)
    with pytest.raises(UsageError, match="no condition encoder"):
        fit(tuner_of(mixture(), train_encoder=True), data, tmp_path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v", "velocity"])
def test_min_snr_weighs_the_error_of_x_0(prediction_type: PredictionType) -> None:
    """min(SNR, gamma) of the mean squared error of x_0, for every prediction type."""
    process = GaussianProcess(CosineVP(min_alpha=0.01), prediction_type)
    t = torch.tensor([0.02, 0.3, 0.5, 0.9], dtype=torch.float64)
    x_0, guess = torch.randn(2, 4, 3, dtype=torch.float64, generator=generators([0])[0])
    alpha, sigma = (level.unsqueeze(1) for level in process.schedule.levels(t))
    x_t = alpha * x_0 + sigma * torch.ones_like(x_0)
    prediction = process.prediction(guess, (x_t - alpha * guess) / sigma, t)
    loss = process.loss(prediction, x_0, x_t, torch.zeros_like(t), t)
    snr = (alpha / sigma).square().squeeze(1)
    wanted = snr.clamp(max=5.0) * (guess - x_0).square().mean(dim=1)
    torch.testing.assert_close(process.min_snr_weight(t, 5.0) * loss, wanted)


def test_snr_gamma_weighs_each_sample() -> None:
    """The loss of a round is the plain one times the weight of its time."""
    losses = []
    for gamma in (None, 5.0):
        tuner = tuner_of(mixture(), snr_gamma=gamma)
        tuner.trainer = trainer_of()
        tuner.setup("fit")
        condition = tuner.pipeline.encode({"index": torch.arange(8)})
        experience = Experience({"x_0": torch.randn(8, 2).clone()}, condition, list(range(8)))
        torch.manual_seed(0)
        losses.append(tuner.loss(experience, generators(range(8)))[0])
    assert not torch.equal(*losses)
    uniform = torch.stack([torch.rand((), generator=g) for g in generators(range(8))])
    process = tuner.pipeline.process
    assert isinstance(process, GaussianProcess)
    weight = process.min_snr_weight(process.draw_times(uniform), 5.0)
    torch.testing.assert_close(losses[1], (losses[0] * weight).float())


def test_snr_gamma_needs_a_signal_to_noise_ratio() -> None:
    tuner = tuner_of(mixture(), snr_gamma=0.0)
    with pytest.raises(UsageError, match="snr_gamma must be positive"):
        tuner.setup("fit")


def test_mixed_states_have_no_signal_to_noise_ratio() -> None:
    tuner = tuner_of(LayoutPipeline("grammar_mixed"), Coverage(), snr_gamma=5.0)
    with pytest.raises(UsageError, match=r"ProductProcess .* model.init_args.snr_gamma to null"):
        tuner.setup("fit")
