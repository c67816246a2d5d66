"""Which strategies a run takes, and what it says of others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.fabric.accelerators.mps import MPSAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.multiprocessing.spawn import ProcessRaisedException

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.strategy import (
    FSDP2Strategy,
    admit,
    check_strategy,
    check_trainer,
    usable_accelerator,
)
from lit_rlft.runs.folder import give_folder
from tests.support import trainer_of

PATH = "lightning.pytorch.strategies"
FSDP, REST = "--config fsdp", "has not been tested; use ddp, or --config fsdp"


def named(value: object) -> str:
    """Return a name that is the same in every process."""
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(
    "known",
    [
        *("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_notebook", "fsdp2"),
        *("lit_rlft.loop.strategy.FSDP2Strategy", f"{PATH}.DDPStrategy", "mine.Strategy"),
        *(DDPStrategy(), FSDP2Strategy(), SingleDeviceStrategy()),
    ],
    ids=named,
)
def test_known_strategies(known: object) -> None:
    check_strategy(known)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("fsdp", f"trainer.strategy fsdp cannot run a network many times.*; use {FSDP}"),
        ("fsdp_cpu_offload", f"fsdp_cpu_offload cannot run a network many times.*{FSDP}"),
        (f"{PATH}.FSDPStrategy", f"FSDPStrategy cannot run a network many times.*{FSDP}"),
        ("deepspeed_stage_2", f"deepspeed_stage_2 has not been tested; {FSDP}.* alike$"),
        (f"{PATH}.DeepSpeedStrategy", f"DeepSpeedStrategy has not been tested; {FSDP}"),
        ("ddp_spawn", "trainer.strategy ddp_spawn cannot copy a whole run .*; use ddp"),
        ("xla", f"trainer.strategy xla {REST}"),
        ("single_xla", f"trainer.strategy single_xla {REST}"),
        ("colossalai", f"trainer.strategy colossalai {REST}"),
        (ModelParallelStrategy(), f"trainer.strategy ModelParallelStrategy {REST}"),
    ],
    ids=named,
)
def test_other_strategies_are_refused_in_one_sentence(given: object, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_strategy(given)


@pytest.mark.parametrize(
    ("strategy", "precision", "sentence"),
    [
        (FSDP2Strategy(), "16-mixed", "trainer.precision 16-mixed scales .* set it to bf16-mixed"),
        (DDPStrategy(), "bf16-true", "trainer.precision bf16-true keeps"),
        (ModelParallelStrategy(), "32-true", "ModelParallelStrategy has not been tested"),
    ],
    ids=named,
)
def test_a_trainer_is_checked_before_it_trains(
    strategy: Any, precision: str, sentence: str
) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy, precision=precision)
    with pytest.raises(UsageError, match=sentence):
        check_trainer(trainer)


@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_fork", "ddp_spawn"])
def test_a_fit_whose_model_would_not_come_back_is_refused(strategy: str, tmp_path: Path) -> None:
    """A command may: the next one reads its checkpoint."""
    trainer = trainer_of(devices=2, strategy=strategy)
    with pytest.raises(UsageError, match=r"made by (fork|spawn).* would not come back .* to 1, or"):
        check_trainer(trainer)
    give_folder(trainer, tmp_path)
    check_trainer(trainer)
    check_trainer(trainer_of(devices=2, strategy="ddp"))


def test_a_notebook_is_told_so_by_its_fit() -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2, 1.0))
    data = MixtureData(num_train=8, num_val=2, num_test=2, batch_size=4)
    with pytest.raises(ProcessRaisedException, match="the tuned model would not come back"):
        trainer_of(devices=2, strategy="ddp_notebook").fit(tuner, data)


def test_a_mac_computes_on_its_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert usable_accelerator("auto") == "auto"
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert [usable_accelerator(given) for given in ("auto", None, "cpu")] == ["cpu"] * 3
    trainer = Trainer(logger=False, default_root_dir=tmp_path)
    assert trainer.strategy.root_device.type == "mps"
    with pytest.raises(UsageError, match=r"no float64.*set it to cpu"):
        admit(trainer)
