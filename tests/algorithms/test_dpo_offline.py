"""Offline Diffusion-DPO: the loss of given pairs, what it learns, what is logged and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import PAIR
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.kit.preference_pairs import PreferencePairs
from lit_rlft.kit.preferences import preference_line
from tests.algorithms.graft_support import ModeValue
from tests.algorithms.test_dpo import values
from tests.support import trainer_of


def tuner_of(**settings: Any) -> DiffusionDPO:
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    base: dict[str, Any] = {"sampler": Sampler(8), "minibatch_size": 32, "num_eval_samples": 1}
    return DiffusionDPO(pipeline, ModeValue(), **{"beta": 2.0, "offline": True, **base, **settings})


def votes(folder: Path, num: int, *, by_value: bool = True) -> Path:
    """Pairs of the mixture's points; the preferred one has the higher value, or is any of both."""
    mixture = GaussianMixturePipeline().mixture
    a, b = mixture.sample(2 * num, torch.Generator().manual_seed(3)).float().view(2, num, 2)
    better = ModeValue()(a, None) >= ModeValue()(b, None)  # type: ignore[arg-type]
    better = (
        better if by_value else torch.rand(num, generator=torch.Generator().manual_seed(4)) < 0.5
    )
    lines = []
    for first, second, swap in zip(a.tolist(), b.tolist(), (~better).tolist(), strict=True):
        chosen, rejected = (second, first) if swap else (first, second)
        lines.append(preference_line({"name": "mixture"}, chosen, rejected))
    path = folder / f"votes_{num}_{by_value}.jsonl"
    path.write_text("".join(lines))
    return path


def test_given_pairs_have_the_loss_of_drawn_ones(tmp_path: Path) -> None:
    """log 2 and 1/2 at the reference; off it, what the online loss is of the same states."""
    tuner = tuner_of()
    data = PreferencePairs(str(votes(tmp_path, 8)), batch_size=4, val_fraction=0.25)
    tuner.trainer = trainer_of()
    tuner.trainer.strategy._lightning_module = tuner
    data.trainer = tuner.trainer
    data.setup("fit")
    tuner.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        experience = tuner.collect(batch, tuner.pipeline.encode(batch))
    for name, side in (("preferred", "chosen"), ("rejected", "rejected")):
        own = torch.tensor([getattr(pair, side) for pair in batch[PAIR]])
        assert torch.equal(tensor_of(experience.states[name]), own)
    losses, logged = tuner.loss(experience, generators(experience.seeds))
    torch.testing.assert_close(losses.detach(), torch.full((4,), 0.6931472))
    assert logged["implicit_accuracy"].tolist() == [0.5] * 4
    assert tuner.num_samples == 8 and not tuner.meter.current.reward_calls


def test_data_without_pairs_are_refused(tmp_path: Path) -> None:
    data = MixtureData(num_train=4, batch_size=4)
    with pytest.raises(UsageError, match="no pairs; give --data PreferencePairs"):
        trainer_of(default_root_dir=tmp_path).fit(tuner_of(), data)


@pytest.mark.slow
def test_it_learns_what_is_preferred_and_nothing_from_coin_flips(tmp_path: Path) -> None:
    def learned(by_value: bool) -> tuple[float, float, float]:
        tuner = tuner_of(optimizer=lambda p: torch.optim.Adam(p, lr=2e-3))
        path = votes(tmp_path, 512, by_value=by_value)
        data = PreferencePairs(str(path), batch_size=96, eval_batch_size=64, val_fraction=0.2)
        trainer = trainer_of(max_epochs=30, default_root_dir=tmp_path, limit_val_batches=1.0)
        trainer.fit(tuner, data)
        accuracy = float(trainer.callback_metrics["val/implicit_accuracy"])
        drawn = values(tuner)
        with tuner.reference.active():
            before = values(tuner)
        apart = drawn - before
        return float(apart.mean()), float(apart.std()) / len(apart) ** 0.5, accuracy

    moved, error, accuracy = learned(by_value=True)
    print(
        f"preferred by value: reward {moved:+.3f} ± {error:.3f}, held-out accuracy {accuracy:.3f}"
    )
    assert moved > 0.2 and moved > 5 * error and accuracy > 0.6
    moved, error, accuracy = learned(by_value=False)
    print(f"coin flips: reward {moved:+.3f} ± {error:.3f}, held-out accuracy {accuracy:.3f}")
    assert moved < 0.1 and 0.3 < accuracy < 0.6
