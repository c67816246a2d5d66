"""What methods of one's own return of files and states: a wrong answer costs no work."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft import GRAFT, Pipeline, RunFiles, Sampler
from lit_rlft.core.checks import UsageError
from lit_rlft.runs.files import no_paths


class SaysNothing(GaussianMixturePipeline):
    def save(self, folder: Path) -> list[Path]:
        torch.save(self.denoiser.state_dict(), folder / "weights.pt")
        return None  # type: ignore[return-value]

    def save_samples(
        self, samples: Any, condition: Any, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        for name, sample in zip(names, samples, strict=True):
            torch.save(sample, folder / f"{name}.pt")
        return None  # type: ignore[return-value]


class SavesNoSamples(GaussianMixturePipeline):
    num_predictions = 0
    save_samples = Pipeline.save_samples

    def predict(self, *args: Any) -> torch.Tensor:
        self.num_predictions += 1
        return super().predict(*args)


def tuner(pipeline: Pipeline | None = None, kind: type[GRAFT] = GRAFT) -> GRAFT:
    sampler = Sampler(num_steps=2, eta=1.0)
    return kind(pipeline or GaussianMixturePipeline(), Coordinate(), sampler=sampler, lora=None)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder,
        callbacks=[RunFiles()], limit_val_batches=0, enable_progress_bar=False,
    )  # fmt: skip


def data() -> MixtureData:
    return MixtureData(num_train=8, num_val=4, num_test=4, batch_size=8, eval_batch_size=4)


def test_an_export_that_returns_nothing_is_kept(tmp_path: Path) -> None:
    message = "SaysNothing.save returned None; it returns the paths that it wrote"
    with pytest.raises(UsageError) as caught:
        trainer(tmp_path).fit(tuner(SaysNothing()), data())
    assert str(caught.value) == message
    (tuned,) = tmp_path.rglob("tuned")
    assert {path.name for path in tuned.iterdir()} == {"weights.pt", "README.md", "lit_rlft.json"}
    assert json.loads((tuned / "lit_rlft.json").read_text())["algorithm"] == "GRAFT"


@pytest.mark.parametrize(
    ("answer", "said"), [(None, "None"), (3, "3"), (["w.pt"], "a list with 'w.pt'")]
)
def test_an_algorithms_own_export_is_named(tmp_path: Path, answer: Any, said: str) -> None:
    class Mine(GRAFT):
        def export(self, folder: Path) -> list[Path]:
            (folder / "w.pt").write_text("weights")
            return answer  # type: ignore[no-any-return]

    with pytest.raises(UsageError) as caught:
        trainer(tmp_path).fit(tuner(kind=Mine), data())
    assert str(caught.value) == f"Mine.export returned {said}; it returns the paths that it wrote"
    (tuned,) = tmp_path.rglob("tuned")
    assert (tuned / "w.pt").is_file() and (tuned / "README.md").is_file()


def test_samples_whose_paths_are_not_said_are_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"SaysNothing\.save_samples returned None; it returns"):
        trainer(tmp_path).predict(tuner(SaysNothing()), data())
    assert len(list(tmp_path.rglob("*.pt"))) == 16


def test_samples_that_cannot_be_written_are_not_drawn(tmp_path: Path) -> None:
    pipeline = SavesNoSamples()
    tuned = tuner(pipeline)
    with pytest.raises(UsageError, match="SavesNoSamples has no file format for samples; define"):
        trainer(tmp_path).predict(tuned, data())
    assert pipeline.num_predictions == 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": 3}, r"Mine.statistics\(\)\['a'\] is 3; give what has state_dict and"),
        ([torch.nn.Linear(1, 1)], r"Mine.statistics\(\) returned a list; it returns a dict"),
        (None, r"Mine.statistics\(\) returned None; it returns a dict"),
    ],
)
def test_statistics_without_a_state_stop_a_run_at_its_start(
    tmp_path: Path, found: Any, message: str
) -> None:
    class Mine(GRAFT):
        def statistics(self) -> Any:
            return found

    mine = tuner(kind=Mine)
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path).fit(mine, data())
    assert mine.num_rounds == 0


def test_right_answers_have_no_problem() -> None:
    assert no_paths([Path("a")], "Mine.save") is None
    assert no_paths([], "Mine.save") is None
