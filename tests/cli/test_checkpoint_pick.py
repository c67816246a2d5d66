"""Which checkpoint is the best one without a setting; fits that end where a reward is gamed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft.callbacks import exploitation_watch
from lit_rlft.cli import main
from lit_rlft.core.reward import Metrics, WeightedSum
from lit_rlft.evaluation.exploitation import Exploitation, held_out
from lit_rlft.voting.human_preference import HumanPreference
from tests.support import TINY_MIXTURE, arguments, report, scalars

CONFIGS = ("gaussian_mixture", "p_graft")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(stage: str, *words: str, **settings: Any) -> None:
    more = {key.replace("__", "."): value for key, value in settings.items()}
    main([*arguments(stage, CONFIGS, TINY_MIXTURE, more), *words])


def monitored(state: dict[str, Any]) -> dict[str, Any]:
    (own,) = [one for one in state["callbacks"].values() if "best_model_path" in one]
    return dict(own)


def test_the_best_checkpoint_is_kept_without_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    command("fit", trainer__max_epochs=4)
    logged = scalars()["val/Coordinate"]
    state = monitored(torch.load("runs/run/checkpoints/last.ckpt", weights_only=True))
    assert state["monitor"] == "val/Coordinate"
    assert float(state["best_model_score"]) == pytest.approx(max(logged))
    best = Path(state["best_model_path"]).name
    assert f"epoch={logged.index(max(logged))}-" in best
    command("test", ckpt_path="best")
    assert f"checkpoint: runs/run/checkpoints/{best}" in capsys.readouterr().out
    assert report(Path("runs/run"))["checkpoint"]["path"] == f"checkpoints/{best}"


@pytest.mark.parametrize("validations", [1.0, 0])
def test_a_run_whose_folder_was_moved_keeps_its_best_checkpoint(validations: float) -> None:
    settings: dict[str, Any] = {"trainer__limit_val_batches": validations}
    command("fit", trainer__max_epochs=2, **settings)
    Path("runs/run").rename("runs/moved")
    folder = Path("runs/moved/checkpoints")
    last, moved = folder / "last.ckpt", {"name": "moved", **settings}
    command("fit", trainer__max_epochs=4, ckpt_path=str(last), **moved)
    state = monitored(torch.load(last, weights_only=True))
    best = folder / Path(state["best_model_path"]).name
    assert {*folder.iterdir()} == {best, last}
    if validations:
        assert float(state["best_model_score"]) == pytest.approx(
            max(scalars("moved")["val/Coordinate"])
        )

    command("fit", trainer__max_epochs=6, ckpt_path=str(last), **{**moved, "name": "other"})
    assert {*folder.iterdir()} == {best, last}  # those of another run are left alone


@pytest.mark.slow  # another fit
def test_without_a_validation_the_newest_is_kept() -> None:
    command("fit", trainer__limit_val_batches=0, trainer__max_epochs=2)
    state = monitored(torch.load("runs/run/checkpoints/last.ckpt", weights_only=True))
    assert state["monitor"] is None and "epoch=1-" in state["best_model_path"]
    assert len(list(Path("runs/run/checkpoints").glob("*.ckpt"))) == 2


def test_what_is_held_out_goes_before_what_is_trained_on() -> None:
    reward, other = Coordinate(0), Quadratic([0.0, 0.0])
    assert held_out(reward, Metrics()) == "Coordinate"
    assert held_out(reward, Metrics([Coordinate(0)])) == "Coordinate"
    assert held_out(reward, Metrics([other])) == "Quadratic"
    judged = WeightedSum({"own": reward, "judge": other}, held_out=["judge"])
    assert held_out(judged, Metrics([other])) == "judge"
    person = HumanPreference()
    assert held_out(person, Metrics()) is None
    assert held_out(person, Metrics([other])) == "Quadratic"


@pytest.mark.parametrize(
    ("stop", "rounds"), [(True, 2), pytest.param(False, 6, marks=pytest.mark.slow)]
)
def test_a_fit_ends_at_the_first_sign_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, stop: bool, rounds: int
) -> None:
    sign = Exploitation(
        "Coordinate", {"mean": 1.0, "sem": 0.1}, {"judge": {"mean": -1, "sem": 0.1}}
    )
    monkeypatch.setattr(exploitation_watch, "exploitation", lambda *args: sign)
    with pytest.warns(UserWarning, match="exploiting the reward") as told:
        command("fit", exploitation__stop=stop, trainer__max_epochs=3)
    (said,) = {str(one.message) for one in told if "exploiting" in str(one.message)}
    assert said.endswith("(exploitation.stop)") is stop
    last = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)
    assert last["lit_rlft"]["num_rounds"] == rounds
