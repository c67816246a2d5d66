"""A part of one's own whose methods take or answer the wrong things is told so, in a sentence."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lit_rlft import GRAFT, Condition, Metric, Metrics, Pipeline, Reward, Sampler, SplitData
from lit_rlft.core.checks import UsageError
from lit_rlft.core.contract import check_networks, check_signatures
from lit_rlft.core.gradient_plan import GradientPlan, check_plan
from lit_rlft.core.process import (
    AngularFlow,
    GaussianProcess,
    GibbsProcess,
    MaskedProcess,
    Process,
    ProductProcess,
)
from lit_rlft.core.process.uniform import UniformProcess
from lit_rlft.core.samples import Samples
from lit_rlft.core.schedule import (
    CosineVP,
    DiscreteVP,
    PolynomialVP,
    RectifiedFlow,
    Schedule,
    vp_betas,
)
from lit_rlft.core.state import State
from lit_rlft.kit.data import Rows
from lit_rlft.loop.base_settings import check_sampler
from tests.support import trainer_of

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

    def keys(self, samples: Any, condition: Condition) -> Any:
        return self.answers.get("keys")

    def features(self, condition: Condition) -> Any:
        return self.answers.get("features", torch.zeros(len(condition), 1))

    def tokens(self, condition: Condition) -> Any:
        return self.answers.get("tokens", torch.zeros(len(condition), 1, 1))


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
        "keys": (x, c),
        "features": (c,),
        "tokens": (c,),
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
    ("predict", lambda right: right.to(torch.complex64), "complex64 .*; a prediction is of floats"),
    ("forward", lambda right: right[:1], r"float32 \[1, 2\]; for these"),
    ("decode", None, "returned None; it returns samples"),
    ("decode", [1, 2, 3, 4], "a list for 5 states"),
    ("decode", torch.zeros(1, 2), r"float32 \[1, 2\] for 5 states"),
    ("decode", Stars(torch.zeros(4, 2)), "a Stars for 5 states"),
    ("keys", [0], "a list; it returns a list with a key for each sample"),
    ("keys", torch.zeros(5), "it returns a list with a key for each sample"),
    ("features", torch.zeros(1, 3), r"float32 \[1, 3\]; features are a tensor \[5, F\]"),
    ("tokens", torch.zeros(5, 3), r"float32 \[5, 3\]; tokens are a tensor \[5, L, F\]"),
    ("encode", {"tables": None}, "whose tables are None; they are a dict"),
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


class Wide(Points):
    """Predicts more than a state; a subclass takes its part."""

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Any:
        return super().predict(x_t, t, condition).repeat(1, 2)


class Narrow(Wide):
    """Takes the part, at a scale."""

    def predict(self, x_t: State, t: Tensor, condition: Condition, scale: float = 1.0) -> Any:
        return scale * super().predict(x_t=x_t, t=t, condition=condition)[:, :2]


class Forwarding(Points):
    """Passes all arguments on."""

    def predict(self, *args: Any, **named: Any) -> Any:
        return super().predict(*args, **named)


class Plain(Points):
    """Has a static method, and one that needs less."""

    @staticmethod
    def describe_all(samples: Any) -> int:
        return len(samples)

    @staticmethod
    def decode(x_0: State, condition: Condition) -> Any:  # type: ignore[override]
        return x_0

    def render(self, samples: Any, condition: Condition | None = None) -> Any:
        return torch.zeros(len(samples), 3, 8, 8)


def test_methods_may_be_written_in_any_way() -> None:
    x, t, c = torch.zeros(5, 2), torch.ones(5), condition()
    assert Narrow().predict(x, t, c, 2.0).shape == (5, 2)
    assert Narrow().predict(x, t, c, scale=2.0).shape == (5, 2)
    assert Forwarding().predict(x_t=x, t=t, condition=c).shape == (5, 2)
    assert Plain().decode(x, c).shape == (5, 2)
    assert Plain().render(x).shape == (5, 3, 8, 8)
    with pytest.raises(UsageError, match=r"Wide\.predict returned .* \[5, 4\]; for these"):
        Wide().predict(x, t, c)


class Mixed:
    """A method for pipelines, in a class that is none."""

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Any:
        return None


class Mixture(Mixed, Points):
    """Has it."""


def test_a_mixin_is_no_way_around() -> None:
    with pytest.raises(UsageError, match=r"Mixture\.predict returned None"):
        ask(Mixture(), "predict")


def test_states_are_asked_for_before_there_is_a_process() -> None:
    assert len(Points(process=None).blank(condition())) == 5


@pytest.mark.parametrize("part", ["denoiser", "process"])
def test_parts_of_another_kind_are_told(part: str) -> None:
    pipeline: Any = Points()
    del pipeline._modules[part]
    object.__setattr__(pipeline, part, "a name")
    with pytest.raises(UsageError, match=f"the {part} of Points is a str; it is a"):
        check_networks(pipeline)


class OneArgument(Reward):
    def forward(self, samples: Any) -> Tensor:  # type: ignore[override]
        return torch.zeros(len(samples))


class TwoArguments(OneArgument):
    def forward(self, points: Any, *others: Any, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return torch.zeros(len(points))


class Swallowing(Metric):
    def evaluate(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {}


class TimeLess(Points):
    def predict(self, x_t: State, t: Tensor) -> Any:  # type: ignore[override]
        return x_t


@pytest.mark.parametrize(
    ("pipeline", "reward", "metrics", "sentence"),
    [
        (Points(), OneArgument(), None, r"OneArgument\.forward must take \(self, samples, cond"),
        (Points(), TwoArguments(), [Swallowing()], r"Swallowing\.evaluate must take \(self, samp"),
        (TimeLess(), TwoArguments(), None, r"TimeLess\.predict must take \(self, x_t, t, cond"),
    ],
)
def test_a_method_that_cannot_be_called_is_told_before_it_is(
    pipeline: Pipeline, reward: Reward, metrics: list[Metric] | None, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        GRAFT(pipeline, reward, metrics=Metrics(metrics), sampler=Sampler(2)).setup("fit")


def test_own_names_and_further_arguments_are_fine() -> None:
    GRAFT(Points(), TwoArguments(), sampler=Sampler(2))
    check_signatures(TwoArguments(), Metric, Reward)
    check_signatures(Points(), Pipeline)
    check_signatures(nn.Linear(2, 2), Pipeline)


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


@pytest.mark.parametrize("wrong", [torch.ones(()), torch.ones(5, 2), None])
def test_a_process_of_ones_own_has_a_loss_per_sample(wrong: Any) -> None:
    """A mean would be broadcast against the weights of samples."""

    class Own(GaussianProcess):
        def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
            return wrong

    x, t = torch.zeros(5, 2), torch.ones(5)
    with pytest.raises(UsageError, match=r"Own\.loss returned .*; .* one loss per sample, \[5\]"):
        Own(RectifiedFlow(), "velocity").loss(x, x, x, 0 * t, t)


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        (torch.linspace(1, 0, 3), r"returned a tensor of float32 \[3\]; it is a tensor \[5\]"),
        ([1.0, 0.75, 0.5, 0.25, 0.0], "returned a list; it is a tensor"),
        (torch.linspace(1000, 0, 5), r"runs from 1000 to 0; levels lie in \[0, 1\]"),
        (torch.linspace(0, 1, 5), "increases; a sampler's levels decrease to data"),
    ],
)
def test_a_grid_of_ones_own_decreases_within_the_levels(times: Any, sentence: str) -> None:
    class Own(GaussianProcess):
        def times(self, num_steps: int) -> Tensor:
            return times

        def ends(self, num_steps: int) -> Tensor:
            return torch.linspace(1, 0, 5)[1:]

    check_sampler(Sampler(num_steps=4), a_flow())
    with pytest.raises(UsageError, match=rf"Own\.times\(4\) {sentence}"):
        check_sampler(Sampler(num_steps=4), Own(RectifiedFlow(), "velocity"))


class OwnSchedule(Schedule):
    """A flow, but for the answers that it is given."""

    def __init__(self, **answers: Any) -> None:
        super().__init__()
        self.answers = answers

    def alpha(self, t: Tensor) -> Tensor:
        return self.answers.get("alpha", lambda t: 1 - t.double())(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.answers.get("sigma", lambda t: t.double())(t)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        own = super().draw_times(uniform, low)
        return self.answers["draw_times"](uniform) if "draw_times" in self.answers else own


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"alpha": lambda t: 1.0}, r"\.alpha returned a float for times \[2, 5\]; it is a"),
        ({"sigma": lambda t: t.mean()}, r"\.sigma returned a tensor of float64 \[\] for"),
        ({"sigma": lambda t: t[:, None]}, r"\.sigma returned a tensor of float64 \[2, 1, 5\] for"),
        ({"alpha": lambda t: (t < 0.5).long()}, r"\.alpha returned a tensor of int64"),
        ({"alpha": lambda t: (1 - t) / t}, r"\.alpha is not a finite number at t = 0$"),
        ({"alpha": lambda t: t}, r"\.alpha rises with t, from 0 at t = 0 to 1 at t = 1; t = 0 is"),
        ({"sigma": lambda t: 1 - t}, r"\.sigma falls with t, from 1 at t = 0 to 0 at t = 1; t"),
    ],
)
def test_a_schedule_of_ones_own_falls_from_data_to_noise(
    answers: dict[str, Any], sentence: str
) -> None:
    for process in (
        GaussianProcess(OwnSchedule(**answers), "velocity"),
        ProductProcess({"a": a_flow(), "b": GaussianProcess(OwnSchedule(**answers), "velocity")}),
    ):
        with pytest.raises(UsageError, match=f"^OwnSchedule{sentence}"):
            check_sampler(Sampler(num_steps=4), process)


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda u: u.mean(), r"returned a tensor of float32 \[\] for 3 uniform .* a tensor \[3\]"),
        (lambda u: u.tolist(), "returned a list for 3 uniform numbers"),
        (lambda u: 1000 * u, r"returned \[0.0, 500.0, 990.0\]; training times lie in \[0, 1\]"),
        (lambda u: u / 0, r"returned \[nan, inf, inf\]; training times lie in"),
    ],
)
def test_training_times_of_ones_own_lie_between_data_and_noise(draw: Any, sentence: str) -> None:
    process = GaussianProcess(OwnSchedule(draw_times=draw), "velocity")
    with pytest.raises(UsageError, match=rf"GaussianProcess\.draw_times {sentence}"):
        check_sampler(Sampler(num_steps=4), process)

    def refuse(uniform: Tensor) -> Tensor:
        raise NotImplementedError

    check_sampler(Sampler(num_steps=4), GaussianProcess(OwnSchedule(draw_times=refuse), "velocity"))


SHIPPED: dict[str, Process] = {
    "discrete": GaussianProcess(DiscreteVP(vp_betas())),
    "discrete, linear": GaussianProcess(DiscreteVP(vp_betas(kind="linear"), ends_at_zero=False)),
    "cosine": GaussianProcess(CosineVP(), "v"),
    "cosine, some signal": GaussianProcess(CosineVP(1e-3)),
    "polynomial": GaussianProcess(PolynomialVP()),
    "shifted flow": GaussianProcess(RectifiedFlow(3.0, (0.0, 1.0)), "velocity"),
    "flow, last": GaussianProcess(RectifiedFlow(last=0.01), "velocity"),
    "flow, knots": GaussianProcess(RectifiedFlow(knots=[(0.2, 0.4), (0.9, 0.05)]), "velocity"),
    "arcs": AngularFlow(),
    "masked": MaskedProcess(3, padded=True, power=2.0),
    "uniform": UniformProcess(3),
    "product": ProductProcess({"a": MaskedProcess(3), "b": a_flow()}),
    "gibbs": GibbsProcess({"a": MaskedProcess(3), "b": a_flow()}, {"a": 4, "b": 4}, 2),
}


@pytest.mark.parametrize("num_steps", [1, 4, 25])
@pytest.mark.parametrize("process", SHIPPED.values(), ids=SHIPPED)
def test_shipped_processes_have_levels_and_training_times(process: Process, num_steps: int) -> None:
    check_sampler(Sampler(num_steps=num_steps), process)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (None, "returned None; it returns a GradientPlan"),
        (GradientPlan(trained=frozenset({9})), r"trains steps \[9\]; .* 1 to 4"),
        (GradientPlan(trained=frozenset({2}), stop=5), "stops at step 5; steps are 1 to 4"),
        (GradientPlan(trained=frozenset({2}), stop=3), r"trains steps \[2\]; .* 3 to 4"),
    ],
)
def test_a_plan_trains_steps_that_are_made(plan: Any, sentence: str) -> None:
    check_plan(GradientPlan(trained=frozenset({2, 4})), 4, "Own")
    with pytest.raises(UsageError, match=rf"Own\.draw {sentence}"):
        check_plan(plan, 4, "Own")


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
def test_a_pipeline_without_a_part_is_told_before_anything_is_drawn(missing: str) -> None:
    tuner = GRAFT(Points(**{missing: None}), First(), sampler=Sampler(num_steps=2))
    with pytest.raises(UsageError, match=rf"Points has no {missing}; set self\.{missing}"):
        trainer_of().fit(tuner, Data(batch_size=4))


def test_a_prediction_that_would_broadcast_ends_a_fit() -> None:
    wrong = Points(predict=lambda right: right[:, :1])
    tuner = GRAFT(wrong, First(), sampler=Sampler(num_steps=2))
    with pytest.raises(UsageError, match=r"Points\.predict returned a tensor of float32"):
        trainer_of().fit(tuner, Data(batch_size=4))
