"""A pipeline of one's own whose methods answer wrongly is told so, in one sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from lit_rlft import GRAFT, Condition, Pipeline, Reward, Sampler, SplitData
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process, ProductProcess
from lit_rlft.core.process.uniform import UniformProcess
from lit_rlft.core.samples import Samples
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import State
from lit_rlft.kit.data import Rows

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
FIVE = {"index": torch.arange(5)}


def a_flow() -> GaussianProcess:
    return GaussianProcess(RectifiedFlow(), "velocity")


class Points(Pipeline):
    """Points of the plane; a case of a test gives one of its answers."""

    name = "points"
    device = torch.device("cpu")

    def __init__(self, **answers: Any) -> None:
        super().__init__()
        self.answers = answers
        if answers.get("denoiser", True):
            self.denoiser = nn.Linear(3, 2)
        if answers.get("process", True):
            self.process = a_flow()

    def encode(self, batch: Any) -> Any:
        rows = torch.zeros(len(batch["index"]), dtype=torch.int64)
        right = {"entries": [{"name": "any"}], "tables": {}, "rows": rows, "null": None}
        given = self.answers.get("encode", {})
        return Condition(**{**right, **given}) if isinstance(given, dict) else given

    def blank(self, condition: Condition) -> Any:
        return self.answers.get("blank", torch.zeros(len(condition), 2))

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Any:
        assert isinstance(x_t, Tensor)
        right = self.denoiser(torch.cat([x_t, t[:, None].to(x_t)], dim=1))
        return self.answers.get("predict", lambda right: right)(right)

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> Any:
        right = self.predict(x_t, t, condition)
        return self.answers.get("forward", lambda right: right)(right)

    def decode(self, x_0: State, condition: Condition) -> Any:
        return self.answers.get("decode", x_0)

    def render(self, samples: Any, condition: Condition) -> Any:
        return self.answers.get("render", torch.zeros(len(samples), 3, 8, 8))

    def states(self, batch: Any) -> Any:
        return self.answers.get("states", torch.zeros(5, 2))


@dataclass(frozen=True)
class Stars(Samples):
    """Samples of a kind of their own."""

    noun: ClassVar[str] = "star"
    place: Tensor

    def __len__(self) -> int:
        return len(self.place)


def condition(num: int = 5) -> Condition:
    return Condition([{"name": "any"}], {}, torch.zeros(num, dtype=torch.int64))


def ask(pipeline: Points, method: str) -> Any:
    x, t, c = torch.zeros(5, 2), torch.full((5,), 0.5), condition()
    given: dict[str, tuple[Any, ...]] = {
        "encode": (FIVE,),
        "states": (FIVE,),
        "blank": (c,),
        "predict": (x, t, c),
        "forward": (x, t, c),
        "decode": (x, c),
        "render": (x, c),
    }
    return getattr(pipeline, method)(*given[method])


@pytest.mark.parametrize("method", ["encode", "blank", "predict", "decode", "render", "states"])
def test_right_answers_come_through(method: str) -> None:
    assert ask(Points(), method) is not None


ANSWERS = [
    ("encode", None, "returned None; it returns a lit_rlft.Condition"),
    ("encode", {"entries": [None]}, "entries are no records"),
    ("encode", {"entries": ["any"]}, "entries are no records"),
    ("encode", {"rows": [0] * 5}, "rows are a list; they are an int64 tensor"),
    ("encode", {"rows": torch.zeros(5)}, r"a tensor of float32 \[5\]; they are an int64"),
    ("encode", {"rows": torch.zeros(1, dtype=torch.int64)}, "1 rows for a batch of 5"),
    ("encode", {"rows": torch.arange(5)}, "from 0 to 4, but it has 1 entries"),
    ("encode", {"rows": torch.full((5,), -1)}, "from -1 to -1"),
    ("encode", {"tables": {"e": torch.zeros(0, 3)}}, "table 'e' is a tensor of float32"),
    ("encode", {"tables": {"e": torch.zeros(1)}, "null": 1}, "1 entries and the null condition"),
    ("blank", None, "returned None; a state is a tensor"),
    ("blank", torch.zeros(1, 2), r"float32 \[1, 2\] for 5 samples"),
    ("blank", torch.zeros(5, 2, dtype=torch.int64), "GaussianProcess are floating-point"),
    ("blank", {"a": torch.zeros(5, 2)}, "fields of a"),
    ("predict", lambda right: None, "returned None; a prediction is"),
    ("predict", lambda right: (right,), "returned a tuple; a prediction is"),
    ("predict", lambda right: right[:, :1], r"\[5, 1\]; for these states it is \[5, 2\]"),
    ("predict", lambda right: right.mean(dim=1), r"float32 \[5\]; for these"),
    ("forward", lambda right: right[:1], r"float32 \[1, 2\]; for these"),
    ("decode", None, "returned None; it returns samples"),
    ("decode", [1, 2, 3, 4], "a list for 5 states"),
    ("decode", torch.zeros(1, 2), r"float32 \[1, 2\] for 5 states"),
    ("decode", Stars(torch.zeros(4, 2)), "a Stars for 5 states"),
    ("render", None, r"returned None; pictures are a tensor \[5, 3, H, W\]"),
    ("render", torch.zeros(5, 8, 8), r"float32 \[5, 8, 8\]; pictures"),
    ("render", torch.zeros(5, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ("states", None, "returned None; a state is"),
    ("states", torch.zeros(1, 2), r"float32 \[1, 2\] for 5 samples"),
]


@pytest.mark.parametrize(("method", "wrong", "sentence"), ANSWERS)
def test_wrong_answers_name_the_method_and_what_it_returns(
    method: str, wrong: Any, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        ask(Points(**{method: wrong}), method)
    assert str(caught.value).startswith(f"Points.{method} returned ")


def test_arguments_may_be_named_in_any_order() -> None:
    pipeline, x, t = Points(predict=lambda right: right[:, :1]), torch.zeros(5, 2), torch.ones(5)
    with pytest.raises(UsageError, match=r"for these states it is \[5, 2\]"):
        pipeline.predict(condition=condition(), t=t, x_t=x)


def test_samples_of_any_type_pass_and_are_selected_by_who_knows_them() -> None:
    class Listed(Points):
        def index_samples(self, samples: Any, rows: Tensor) -> Any:
            return [samples[i] for i in rows.tolist()]

    numbers = [1, 2, 3, 4, 5]
    assert ask(Points(decode=Stars(torch.zeros(5, 2))), "decode").place.shape == (5, 2)
    assert ask(Points(decode=numbers), "decode") is numbers
    rows = torch.tensor([2, 0])
    assert Listed().index_samples(numbers, rows) == [3, 1]
    with pytest.raises(UsageError, match=r"Points\.decode returned a list, among which nothing"):
        Points().index_samples(numbers, rows)


CLASSES: list[Process] = [MaskedProcess(3), UniformProcess(3)]


@pytest.mark.parametrize("process", CLASSES)
def test_classes_are_integers_and_predicted_by_logits(process: Process) -> None:
    x = torch.zeros(5, 4, dtype=torch.int64)
    assert process.state_problem(x) is None
    assert process.state_problem(x.float()) == (
        f"a tensor of float32 [5, 4]; states of a {type(process).__name__} are int64 tensors"
    )
    assert process.prediction_problem(torch.zeros(5, 4, 3), x) is None
    wrong = "a tensor of float32 [5, 4, 4]; for these states it is [5, 4, 3]"
    assert process.prediction_problem(torch.zeros(5, 4, 4), x) == wrong


def test_fields_are_checked_one_by_one() -> None:
    process = ProductProcess({"kind": MaskedProcess(3), "place": a_flow()})
    kind, place = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 2)
    x: State = {"kind": kind, "place": place}
    right: State = {"kind": torch.zeros(5, 3), "place": place}
    assert process.state_problem(x) is None
    assert process.prediction_problem(right, x) is None
    assert "the fields" in str(process.state_problem({"kind": kind}))
    assert "(field 'kind')" in str(process.state_problem({"kind": place, "place": place}))
    unfit = str(process.prediction_problem({"kind": kind}, x))
    assert "; the fields of a ProductProcess are" in unfit
    wrong = {"kind": torch.zeros(5, 3), "place": place[:, :1]}
    assert process.prediction_problem(wrong, x) == (
        "a tensor of float32 [5, 1]; for these states it is [5, 2] (field 'place')"
    )


class Data(SplitData):
    """Rows without a column."""

    def rows(self, split: Any) -> Any:
        return Rows(8, lambda i: {})


class First(Reward):
    """The first coordinate."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        first: Tensor = samples[:, 0]
        return first


@pytest.mark.parametrize("missing", ["denoiser", "process"])
def test_a_pipeline_without_a_part_is_told_before_anything_is_drawn(
    missing: str, tmp_path: Path
) -> None:
    tuner = GRAFT(Points(**{missing: None}), First(), sampler=Sampler(num_steps=2))
    trainer = Trainer(max_epochs=1, accelerator="cpu", **QUIET, default_root_dir=tmp_path)
    with pytest.raises(UsageError, match=rf"Points has no {missing}; set self\.{missing}"):
        trainer.fit(tuner, Data(batch_size=4))


def test_a_prediction_that_would_broadcast_ends_a_fit(tmp_path: Path) -> None:
    wrong = Points(predict=lambda right: right[:, :1])
    tuner = GRAFT(wrong, First(), sampler=Sampler(num_steps=2))
    trainer = Trainer(max_epochs=1, accelerator="cpu", **QUIET, default_root_dir=tmp_path)
    with pytest.raises(UsageError, match=r"Points\.predict returned a tensor of float32"):
        trainer.fit(tuner, Data(batch_size=4))
