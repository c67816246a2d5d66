"""One module in several fits, tests and predictions, as a notebook does it."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.callbacks.ema import EMA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

DATA: dict[str, Any] = {"num_train": 8, "num_val": 4, "num_test": 4, "batch_size": 4}


def module_of(**settings: Any) -> GRAFT:
    pipeline = GaussianMixturePipeline(residual_width=8)
    sampler = Sampler(3, 1.0)
    return GRAFT(pipeline, Coordinate(), sampler=sampler, num_eval_samples=2, **settings)


def weights(module: GRAFT) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.trainable().parameters() if p.requires_grad]


def test_a_refused_module_can_be_tried_again(tmp_path: Path) -> None:
    module = module_of(lora=LoRA(rank=2, targets=["nope"]))
    for _ in range(2):
        with pytest.raises(UsageError, match="no layer of the denoiser"):
            trainer_of(default_root_dir=tmp_path).fit(module, MixtureData(**DATA))
    module.lora = None
    trainer_of(default_root_dir=tmp_path).fit(module, MixtureData(**DATA))
    assert module.num_rounds == 2


def test_predictions_cost_training_nothing(tmp_path: Path) -> None:
    module, data = module_of(), MixtureData(**DATA)
    trainer = trainer_of(default_root_dir=tmp_path)
    trainer.fit(module, data)
    before = module.meter.training.as_dict()
    assert trainer.predict(module, data) and before["reward_calls"] == 8 * 4
    assert module.meter.training.as_dict() == before
    trainer_of(default_root_dir=tmp_path).fit(module, data)
    assert module.num_rounds == 4 and module.meter.training.reward_calls == 2 * 8 * 4


def test_a_test_of_the_average_leaves_the_weights(tmp_path: Path) -> None:
    module, data, average = module_of(), MixtureData(**DATA), EMA(0.9)
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[average])
    trainer.fit(module, data)
    with torch.no_grad():
        for parameter in module.trainable().parameters():
            parameter.add_(1.0)
    before = weights(module)
    for run in (trainer.test, trainer.predict):
        run(module, data)
        assert all(torch.equal(a, b) for a, b in zip(weights(module), before, strict=True))


class _Told(Hooks):
    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.told = fails, []  # type: ignore[var-annotated]

    def on_phase_start(self, module: Any, name: str) -> None:
        self.told.append(("start", name))
        if self.fails:
            raise RuntimeError("in a hook")
        self.enabled = False  # from here on not told of new phases, but of this one's end

    def on_phase_end(self, module: Any, name: str, num_samples: int) -> None:
        self.told.append(("end", name))


def test_whoever_hears_a_phase_begin_hears_it_end(tmp_path: Path) -> None:
    first, second = _Told(), _Told(fails=True)
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[first, second])
    with pytest.raises(RuntimeError, match="in a hook"):
        trainer.fit(module_of(), MixtureData(**DATA))
    assert first.told == [("start", "collect"), ("end", "collect")]
    assert second.told == [("start", "collect")]


def test_an_average_of_half_precision_moves(tmp_path: Path) -> None:
    """A thousandth of what a weight is away from its average is nothing to bfloat16."""
    module, average = module_of(lora=LoRA(rank=1, dtype="bfloat16")), EMA(0.999)
    trainer = trainer_of()  # one: to make it takes 17 ms
    module.setup("fit")
    trained = [p for p in module.trainable().parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    for value in (1.0, 1.5):
        with torch.no_grad():
            for parameter in trained:
                parameter.fill_(value)
        for _ in range(3000):
            average.on_train_batch_end(trainer, module, None, None, 0)
    assert average.average is not None
    expected = 1.5 - 0.5 * math.prod(min(0.999, (1 + n) / (10 + n)) for n in range(3001, 6001))
    assert all(torch.allclose(own, torch.tensor(expected), atol=1e-3) for own in average.average)
    again = EMA(0.999)
    old = average.state_dict()
    again.load_state_dict({**old, "average": [own.bfloat16() for own in old["average"]]})
    assert again.average is not None and again.average[0].dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"lora": LoRA(rank=2)}], ids=["same", "other weights"])
def test_an_average_of_another_model_is_forgotten(settings: dict[str, Any], tmp_path: Path) -> None:
    shared, own = EMA(0.9), EMA(0.9)

    def tuned(average: EMA, seed: int, **given: Any) -> GRAFT:
        torch.manual_seed(seed)
        optimizer = partial(torch.optim.Adam, lr=0.1)
        module = module_of(optimizer=optimizer, **given)
        trainer = trainer_of(default_root_dir=tmp_path, callbacks=[average])
        trainer.fit(module, MixtureData(**DATA))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    first = tuned(shared, 0)
    averaged = weights(first)
    second, alone = tuned(shared, 1, **settings), tuned(own, 1, **settings)
    assert shared.num_updates == own.num_updates == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(alone), strict=True))
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[shared], max_epochs=2)
    again = module_of(optimizer=partial(torch.optim.Adam, lr=0.1), **settings)
    trainer.fit(again, MixtureData(**DATA), ckpt_path=tmp_path / "last.ckpt")
    assert shared.num_updates == 4 and again.num_rounds == 4
    trainer_of(default_root_dir=tmp_path, callbacks=[shared]).test(first, MixtureData(**DATA))
    assert shared.average is None
    assert all(torch.equal(a, b) for a, b in zip(weights(first), averaged, strict=True))


@pytest.mark.parametrize("used", [False, True])
def test_an_average_that_was_loaded_is_the_next_models(used: bool, tmp_path: Path) -> None:
    average = EMA(0.9)
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[average])
    if used:
        trainer.fit(module_of(), MixtureData(**DATA))
    module = module_of()
    average.load_state_dict({"average": weights(module), "num_updates": 7})
    trainer_of(default_root_dir=tmp_path, callbacks=[average]).fit(module, MixtureData(**DATA))
    assert average.num_updates == 9


def measured(module: GRAFT, folder: Path) -> float:
    trainer_of(default_root_dir=folder).test(module, MixtureData(**DATA), verbose=False)
    return module.evaluator.summary()["tuned"][module.reward.name]["mean"]


def fitted(folder: Path, **settings: Any) -> GRAFT:
    module = module_of(optimizer=lambda weights: torch.optim.Adam(weights, lr=0.1), **settings)
    trainer_of(default_root_dir=folder).fit(module, MixtureData(**DATA))
    return module


@pytest.mark.parametrize("lora", [LoRA(rank=2), LoRA(rank=3), None], ids=str)
def test_a_second_tuner_does_not_take_a_pipeline_with_the_first_ones_lora(
    lora: LoRA | None, tmp_path: Path
) -> None:
    first = fitted(tmp_path, lora=LoRA(rank=2))
    before, gain = weights(first), measured(first, tmp_path)
    second = GRAFT(first.pipeline, Coordinate(), sampler=Sampler(3, 1.0), lora=lora)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"has the LoRA of another tuner.*a new pipeline, or"):
            trainer_of(default_root_dir=tmp_path).fit(second, MixtureData(**DATA))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), before, strict=True))
    assert measured(first, tmp_path) == gain


def test_a_tuner_itself_a_copy_and_what_leaves_the_denoiser_alone_find_its_lora(
    tmp_path: Path,
) -> None:
    first = fitted(tmp_path, lora=LoRA(rank=2))
    for tuner in (copy.deepcopy(first), first):
        trainer_of(default_root_dir=tmp_path).fit(tuner, MixtureData(**DATA))
        assert tuner.num_rounds == 4
    gain = measured(first, tmp_path)
    beside = NoisePPO(first.pipeline, Coordinate(), sampler=Sampler(3, 0.0))
    trainer_of(default_root_dir=tmp_path).fit(beside, MixtureData(**DATA))
    assert beside.num_rounds == 2 and measured(first, tmp_path) == gain


def test_a_tuner_that_is_refused_after_its_lora_was_made_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise UsageError("no such switch")

    module = module_of(lora=LoRA(rank=2))
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="no such switch"):
        patch.setattr("lit_rlft.algorithms.base.checkpoint_blocks", refuse)
        trainer_of(default_root_dir=tmp_path).fit(module, MixtureData(**DATA))
    trainer_of(default_root_dir=tmp_path).fit(module, MixtureData(**DATA))
    assert module.num_rounds == 2


def test_checkpoints_are_loaded_into_a_new_pipeline(tmp_path: Path) -> None:
    data, remedy = MixtureData(**DATA), r"ake a new pipeline"
    for lora in (LoRA(rank=2), None):
        module = module_of(lora=lora)
        trainer = trainer_of(default_root_dir=tmp_path)
        trainer.fit(module, data)
        trainer.save_checkpoint(path := tmp_path / "own.ckpt")
        parts: dict[str, Any] = {"pipeline": module.pipeline, "reward": Coordinate()}
        with pytest.raises(UsageError, match=remedy):
            GRAFT.load_from_checkpoint(path, **parts)
        second = GRAFT(**parts, sampler=Sampler(3, 1.0), num_eval_samples=2, lora=lora)
        with pytest.raises(UsageError, match=remedy):
            trainer_of(default_root_dir=tmp_path).fit(second, data, ckpt_path=path)
