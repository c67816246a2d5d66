"""What waits for the lowest rewards is warned of."""

import warnings
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.last_checkpoint import LastCheckpoint
from lit_rlft.callbacks.monitored import Monitored
from lit_rlft.core.sampling import Sampler
from tests.support import trainer_of

REWARD = "val/Coordinate"


def told(*callbacks: Any, plateau: dict[str, Any] | None = None) -> list[str]:
    """Run one round; return its warnings of modes."""
    schedule = plateau and (lambda optimizer: ReduceLROnPlateau(optimizer, **plateau))
    tuner = GRAFT(
        GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2), lr_scheduler=schedule or None
    )
    settings = {"limit_val_batches": 1, "enable_checkpointing": True}
    trainer = trainer_of(callbacks=[Monitored(), *callbacks], **settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(tuner, MixtureData(num_train=4, num_val=2, batch_size=4, eval_batch_size=2))
    return [str(one.message) for one in found if "with mode" in str(one.message)]


@pytest.mark.parametrize("name", [REWARD, "val_gain/Coordinate", "train/reward"])
def test_the_lowest_rewards_are_warned_of(name: str, tmp_path: Any) -> None:
    said = f".monitor {name} with mode min takes the lowest rewards for the best; set "
    assert told(EarlyStopping(name)) == [f"EarlyStopping{said}EarlyStopping.mode to max"]
    save = LastCheckpoint(tmp_path, monitor=name, save_last=True)
    assert told(save) == [f"checkpoint{said}checkpoint.mode to max"]
    further = LastCheckpoint(tmp_path, monitor=name, every_n_epochs=2)
    last = LastCheckpoint(tmp_path, save_last=True)
    assert told(further, last) == [f"LastCheckpoint{said}LastCheckpoint.mode to max"]
    plateau = {"monitor": name}
    assert told(plateau=plateau) == [f"ReduceLROnPlateau{said}ReduceLROnPlateau.mode to max"]


def test_another_callbacks_mode_is_not_meant(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor=REWARD, mode="max")
    least = ModelCheckpoint(tmp_path / "least", monitor="train/loss", mode="min")
    assert told(best, least, plateau={"monitor": "train/loss"}) == []
