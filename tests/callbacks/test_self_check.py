"""The self-check stops what cannot learn before weights change, and names cause and remedy."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.callbacks.self_check import SelfCheck, _cause
from lit_rlft.cli import main
from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import Generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State
from lit_rlft.loop.experience import Experience
from tests.support import arguments, checkpoint, trainer_of, working_directory
from tests.test_distributed import processes

FAMILY: dict[str, Callable[..., RewardFineTuner]] = {
    "DDPO": lambda *args: DDPO(*args, sampler=Sampler(4, 1.0)),
    "NoisePPO": lambda *args: NoisePPO(*args, sampler=Sampler(4)),
    "GRAFT": lambda *args: GRAFT(*args, sampler=Sampler(4)),
    "RewardGradient": lambda *args: RewardGradient(*args, method=DRaFT(1), sampler=Sampler(4)),
}


class Constant(Reward):
    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return 0 * samples.sum(dim=1) + 0.25


class Sometimes(Reward):
    """Fails for about a half of the samples."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples[:, 0].where(samples[:, 0] > 0, torch.nan)


class Detached(Reward):
    """What a wrapper of somebody else's scorer often does."""

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples.detach()[:, 0]


class Altered(GaussianMixturePipeline):
    """A pipeline whose guided prediction goes through `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(residual_width=16)
        self.denoiser.add_module("layer", layer)

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> State:
        return self.denoiser.get_submodule("layer")(super().forward(x_t, t, condition))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Broken(GRAFT):
    """A loss whose value, or whose gradient, is not finite from the second update on."""

    def __init__(self, breaks: Callable[[Tensor], Tensor]) -> None:
        super().__init__(
            GaussianMixturePipeline(residual_width=16),
            Coordinate(),
            sampler=Sampler(4),
            minibatch_size=4,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        )
        self.breaks = breaks
        self.last: dict[str, Tensor] = {}

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        losses, values = super().loss(experience, noise)
        self.last = deepcopy(dict(self.trainable().state_dict()))
        return (self.breaks(losses) if self.num_updates else losses), values


def ddpo(pipeline: GaussianMixturePipeline | None = None, **settings: Any) -> DDPO:
    settings = {"sampler": Sampler(4, 1.0), "advantage": GroupAdvantage(), **settings}
    return DDPO(pipeline or GaussianMixturePipeline(residual_width=16), Coordinate(), **settings)


def fit(tuner: RewardFineTuner, folder: Path, check: SelfCheck | None = None) -> RewardFineTuner:
    check = check or SelfCheck()
    trainer = trainer_of(default_root_dir=folder, callbacks=[check], max_epochs=2)
    trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
    return tuner


def said(run: Callable[[], Any]) -> list[str]:
    """Return what the check warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    texts = [str(w.message) for w in caught if w.filename.endswith("self_check.py")]
    assert len(set(texts)) == len(texts)
    return texts


def assert_unchanged(before: dict[str, Tensor], tuner: RewardFineTuner) -> None:
    for name, value in tuner.trainable().state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_a_healthy_run_says_nothing(make: Callable[..., RewardFineTuner], tmp_path: Path) -> None:
    tuner = make(GaussianMixturePipeline(residual_width=16), Coordinate())
    assert said(lambda: fit(tuner, tmp_path)) == []
    assert tuner.num_updates > 1


def test_dropout_is_named(tmp_path: Path) -> None:
    """It is active in training and not while sampling."""
    tuner = ddpo(Altered(nn.Dropout(0.5)))
    with pytest.raises(UsageError) as raised:
        fit(tuner, tmp_path)
    message = str(raised.value)
    assert re.search(r"first update of round 1 a probability ratio at step [0-3] \(t = ", message)
    assert "in float32 (trainer.precision 32-true): the denoiser has dropout" in message
    assert tuner.num_updates == 0


@pytest.mark.parametrize(
    ("precision", "half", "remedy"),
    [
        ("bf16-mixed", False, "set trainer.precision to 32-true"),
        ("bf16-mixed", True, "trainer.precision to 32-true and pipeline.init_args.frozen_dtype to"),
        ("32-true", True, "set pipeline.init_args.frozen_dtype to auto"),
        ("32-true", False, "look for noise, state or batch statistics"),
    ],
)
def test_the_remedy_is_for_what_is_in_half_precision(
    precision: str, half: bool, remedy: str
) -> None:
    denoiser = nn.Linear(2, 2)
    assert remedy in _cause(denoiser.bfloat16() if half else denoiser, precision, sized=True)


def test_a_denoiser_with_noise_of_its_own_is_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="look for noise, state or batch statistics in it"):
        fit(ddpo(Altered(Noise())), tmp_path)
    fit(ddpo(Altered(Noise())), tmp_path, SelfCheck(ratio_tolerance=1e6))
    fit(ddpo(Altered(Noise())), tmp_path, SelfCheck(enabled=False))


@pytest.mark.parametrize(("clip_range", "tolerance"), [(1e-4, 5e-5), (0.2, 0.01)])
def test_the_tolerance_is_half_the_clip_range(
    clip_range: float, tolerance: float, tmp_path: Path
) -> None:
    for factor in (0.5, 1.5):
        tuner = ddpo(clip_range=clip_range)
        original = tuner.loss

        def shifted(part: Any, rows: Any, by: float = factor, own: Any = original) -> Any:
            old = part.states["log_prob"]
            states = {**part.states, "log_prob": old - torch.log1p(torch.tensor(by * tolerance))}
            return own(Experience(states, part.condition, part.seeds), rows)

        tuner.loss = shifted  # type: ignore[method-assign]
        if factor < 1:
            fit(tuner, tmp_path)
        else:
            with pytest.raises(UsageError, match=f"more than {tolerance:.2g}"):
                fit(tuner, tmp_path)


def test_rounding_by_batch_size_cancels_in_half_precision(tmp_path: Path) -> None:
    """Where microbatches have one size; where they have not, that is the remedy named."""

    def run(microbatch_size: int | None) -> RewardFineTuner:
        tuner = ddpo(
            log_prob_reduction="sum",
            clip_range=1e-6,
            num_epochs=2,
            minibatch_size=5,
            microbatch_size=microbatch_size,
        )
        trainer = trainer_of(
            default_root_dir=tmp_path, callbacks=[SelfCheck()], precision="bf16-mixed", max_epochs=2
        )
        own = tuner.pipeline.forward

        def rounded(x: State, t: Tensor, condition: Condition) -> State:
            prediction = own(x, t, condition)
            assert isinstance(prediction, Tensor)
            # What the rounding of a kernel for so many rows amounts to.
            return prediction * (1 + 2**-8 * (len(condition) % 7))

        tuner.pipeline.forward = rounded  # type: ignore[method-assign]
        trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
        return tuner

    for size in (1, 6):
        assert run(size).num_updates == 2 * 7 * 2
    with pytest.raises(UsageError, match=r"set model.init_args.microbatch_size, which gives them"):
        run(None)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda losses: losses * torch.nan, r"\d of \d losses of update 1 are not finite"),
        # Finite, but the root's slope at 0 is not.
        (lambda losses: (losses * 0).sqrt(), r"gradients of update 1 are not finite \(first in "),
        # Finite, but their squares are not.
        (lambda losses: losses * 1e30, r"gradients of update 1 are not finite; the weights are"),
    ],
    ids=["loss", "gradient", "norm"],
)
def test_what_is_not_finite_never_reaches_the_weights(
    breaks: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    tuner = Broken(breaks)
    with pytest.raises(UsageError, match=message):
        fit(tuner, tmp_path)
    assert tuner.num_updates == 1
    assert_unchanged(tuner.last, tuner)
    assert all(value.isfinite().all() for value in tuner.trainable().state_dict().values())


class Overflows(torch.optim.SGD):
    """Writes NaN, as Adam does in half precision, or infinity, in its third step."""

    wrong = math.nan

    def step(self, *args: Any, **more: Any) -> None:
        super().step(*args, **more)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            self.param_groups[0]["params"][-1].data.flatten()[-1] = self.wrong


class OverflowsToInfinity(Overflows):
    wrong = -math.inf


@pytest.mark.parametrize("optimizer", [Overflows, OverflowsToInfinity])
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("minibatch_size", [4, 8])
def test_weights_that_are_not_finite_are_never_saved(
    optimizer: type[Overflows], checked: bool, minibatch_size: int, tmp_path: Path
) -> None:
    """Whether a later update of the round would meet them or not; with and without the check."""
    tuner = Broken(lambda losses: losses)
    tuner.make_optimizer = lambda parameters: optimizer(parameters, lr=0.01)
    tuner.minibatch_size = minibatch_size
    check = SelfCheck(enabled=checked)
    save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_last=True)
    trainer = trainer_of(
        default_root_dir=tmp_path, callbacks=[check, save], max_epochs=4, enable_checkpointing=True
    )
    with pytest.raises(UsageError, match=r"the weights are not finite after update \d \(first in "):
        trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
    held = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    assert held["lit_rlft"]["num_updates"] in (1, 2)
    assert all(value.isfinite().all() for value in held["state_dict"].values())
    before = (tmp_path / "kept/last.ckpt").read_bytes()
    with pytest.raises(UsageError, match="neither saved nor exported"):
        trainer.save_checkpoint(tmp_path / "kept/last.ckpt")
    assert (tmp_path / "kept/last.ckpt").read_bytes() == before
    with pytest.raises(UsageError, match="neither saved nor exported"):
        tuner.on_fit_end()
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("precision", "remedy"), [("16-true", "16-mixed"), ("bf16-true", "bf16-mixed")]
)
def test_weights_of_16_bits_are_refused_before_anything_is_sampled(
    precision: str, remedy: str, tmp_path: Path
) -> None:
    tuner = ddpo()
    trainer = trainer_of(default_root_dir=tmp_path, precision=precision)
    with pytest.raises(UsageError, match=f"trainer.precision {precision} .* set it to {remedy}"):
        trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
    assert tuner.num_samples == 0


class Cut(GaussianMixturePipeline):
    """Its samples do not lead back to the denoiser."""

    def decode(self, x_0: Any, condition: Any) -> Any:
        return super().decode(x_0, condition).detach()


@pytest.mark.parametrize(
    ("pipeline", "reward", "sentence"),
    [
        (Cut, Coordinate, "^the loss of DRaFT has no gradient: nothing"),
        (
            GaussianMixturePipeline,
            Detached,
            "^Detached has .* but its values have no gradient; look",
        ),
    ],
)
def test_a_loss_without_gradient_is_named(
    pipeline: Any, reward: Any, sentence: str, tmp_path: Path
) -> None:
    tuner = FAMILY["RewardGradient"](pipeline(residual_width=16), reward())
    with pytest.raises(UsageError, match=sentence):
        fit(tuner, tmp_path)
    assert tuner.num_updates == 0


@pytest.mark.parametrize("name", FAMILY)
def test_constant_rewards_are_said_once(name: str, tmp_path: Path) -> None:
    tuner = FAMILY[name](GaussianMixturePipeline(residual_width=16), Constant())
    texts = said(lambda: fit(tuner, tmp_path))
    assert sum("Constant does not tell samples apart" in text for text in texts) == 1
    groups = [text for text in texts if "in 100% of the groups of round 1" in text]
    assert len(groups) == (name in ("DDPO", "NoisePPO"))


@pytest.mark.parametrize(
    ("parts", "number"),
    [(([0.0, 0.0], [1.0, 2.0]), 0), (([0.5, 0.5], [0.5]), 3), (([0.5], [torch.nan]), 0)],
    ids=["another process has others", "all processes have the same", "too few"],
)
@pytest.mark.parametrize("in_updates", [False, True])
def test_rewards_are_constant_where_those_of_all_processes_are(
    parts: tuple[list[float], ...],
    number: int,
    in_updates: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many rewards that are mostly 0, one process may well see no other."""
    said: list[str] = []
    monkeypatch.setattr("lit_rlft.callbacks.self_check.rank_zero_warn", said.append)
    condition = GaussianMixturePipeline().example()

    def work(rank: int) -> None:
        check, tuner, rewards = SelfCheck(), ddpo(), torch.tensor(parts[rank])
        trainer: Any = SimpleNamespace(world_size=2)
        tuner._trainer = trainer
        shown = {} if in_updates else {"reward": rewards}
        part = Experience({}, condition, [0], histograms=shown)
        check.on_experience(tuner, part)
        if in_updates:
            losses = torch.zeros(len(rewards), requires_grad=True) * 1
            check.on_losses(tuner, part, losses, {"reward": rewards})
            check.on_phase_end(tuner, "update", 0)
        check.on_train_batch_end(trainer, tuner, None, None, 0)

    assert processes(monkeypatch, 2, work) == [None, None]
    assert len(said) == 2 * (number > 0)
    assert all(text.startswith(f"all {number} rewards of round ") for text in said)


def test_failed_rewards_are_counted(tmp_path: Path) -> None:
    tuner = DDPO(GaussianMixturePipeline(residual_width=16), Sometimes(), sampler=Sampler(4, 1.0))
    (text,) = said(lambda: fit(tuner, tmp_path))
    share = re.fullmatch(r"Sometimes failed for (\S+)% of the samples of round 1; .*", text)
    assert share and 20 < float(share[1]) < 80


def test_parameters_that_the_loss_does_not_reach(tmp_path: Path) -> None:
    class Idle(GaussianMixturePipeline):
        def __init__(self) -> None:
            super().__init__(residual_width=16)
            self.denoiser.add_module("idle", nn.Linear(2, 2))

    (text,) = said(lambda: fit(ddpo(Idle()), tmp_path))
    assert re.match(r"the loss does not reach 2 of \d+ trainable parameters \(first idle", text)


def test_gradients_that_are_zero(tmp_path: Path) -> None:
    tuner = FAMILY["RewardGradient"](GaussianMixturePipeline(residual_width=16), Constant())
    texts = said(lambda: fit(tuner, tmp_path))
    assert any("all gradients of update 0 are zero" in text for text in texts)


def test_what_was_trained_before_a_stop_is_kept(tmp_path: Path) -> None:
    """The run resumes with the round that could not be finished."""
    (tmp_path / "flaky.py").write_text(
        "from domains.gaussian_mixture.rewards import Coordinate\n"
        "class Flaky(Coordinate):\n"
        "    calls = 0\n"
        "    def forward(self, samples, condition):\n"
        "        Flaky.calls += 1\n"
        "        factor = float('nan') if Flaky.calls == 3 else 1\n"
        "        return super().forward(samples, condition) * factor\n"
    )
    configs: Sequence[str] = (
        "configs/domains/gaussian_mixture.yaml",
        "configs/algorithms/graft.yaml",
    )
    settings = {
        "reward": "flaky.Flaky",
        "data.init_args.num_train": 32,
        "data.init_args.num_val": 2,
        "data.init_args.batch_size": 8,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
    }
    with working_directory(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(SystemExit, match="Flaky failed for all 32 samples"):
            main(arguments("fit", configs, settings, {"name": "run"}))
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == 2
        last = {"ckpt_path": "runs/run/checkpoints/last.ckpt"}
        main(arguments("fit", configs, settings, {"name": "run"}, last))
        main(arguments("fit", configs, settings, {"name": "whole"}))
        resumed, whole = checkpoint("run"), checkpoint("whole")
        assert whole["lit_rlft"]["num_rounds"] == 4
        for name, value in whole["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], value), name
