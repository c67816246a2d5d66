"""A part or a number of the wrong kind is refused before anything is drawn, in one sentence."""

from collections.abc import Callable
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor, nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft import DDPO, GRAFT, LoRA, Metrics, Product, Sampler, TopK, WeightedSum
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import BadArgument, UsageError, at_least, of_kind


class Plain:
    """Scores samples, but is no reward."""

    def __call__(self, samples: Tensor, condition: Any) -> Tensor:
        return samples[:, 0]


def first(samples: Tensor, condition: Any) -> Tensor:
    return samples[:, 0]


REWARD = "give a lit_rlft.Reward: a subclass, or the domain's FunctionReward around a function"


def setup(kind: type[RewardFineTuner] = GRAFT, **settings: Any) -> None:
    parts = {"pipeline": GaussianMixturePipeline(), "reward": Quadratic()}
    kind(**{**parts, "sampler": Sampler(4, eta=1.0), **settings}).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": first}, f"GRAFT: reward is a function; {REWARD}"),
        ({"reward": Plain()}, f"GRAFT: reward is a Plain; {REWARD}"),
        ({"reward": Plain}, f"GRAFT: reward is the class Plain; {REWARD}"),
        ({"reward": Quadratic}, "GRAFT: reward is the class Quadratic; write Quadratic()"),
        ({"reward": nn.Linear(2, 1)}, f"GRAFT: reward is a Linear; {REWARD}"),
        ({"reward": None}, "GRAFT: reward is None; give"),
        ({"metrics": [Coordinate()]}, "GRAFT: metrics is a list; give Metrics([...])"),
        ({"selection": lambda rewards: rewards > 0}, "selection is a function; give a Selection"),
        ({"selection": TopK}, "GRAFT: selection is the class TopK; write TopK()"),
        ({"sampler": 20}, "GRAFT: sampler is 20; give Sampler(num_steps=...)"),
        ({"lora": 8}, "GRAFT: lora is 8; give LoRA(rank=...)"),
        ({"lora": {"rank": 4}}, "GRAFT: lora is a dict; give LoRA(rank=...)"),
        ({"dial": [1, 2]}, "GRAFT: dial is a list; give a Dial"),
        ({"reward_workers": 2}, "GRAFT: reward_workers is 2; give a RewardWorkers"),
        ({"optimizer": "adam"}, "GRAFT: optimizer is 'adam'; give a class or a function"),
        ({"lr_scheduler": "cosine"}, "GRAFT: lr_scheduler is 'cosine'; give a class or"),
        ({"num_epochs": 1.5}, "GRAFT: num_epochs must be a whole number, got 1.5"),
        ({"num_epochs": "2"}, "GRAFT: num_epochs must be a whole number, got '2'"),
        ({"num_candidates": 4.0}, "GRAFT: num_candidates must be a whole number, got 4.0"),
        ({"minibatch_size": 8.0}, "GRAFT: minibatch_size must be a whole number, got 8.0"),
        ({"microbatch_size": 2.0}, "GRAFT: microbatch_size must be a whole number, got 2.0"),
        ({"sampling_batch_size": 16.0}, "sampling_batch_size must be a whole number, got 16.0"),
        ({"seed": 1.5}, "GRAFT: seed must be a whole number, got 1.5"),
        ({"contrast": "0.5"}, "GRAFT: contrast must be a number, got '0.5'"),
        ({"iterative": "no"}, "GRAFT: iterative must be true or false, got 'no'"),
    ],
)
def test_of_a_tuner(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument) as caught:
        setup(**settings)
    assert message in str(caught.value)


class Unborn(Coordinate):
    """Forgets its base's constructor."""

    def __init__(self) -> None:
        self.axis = 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: setup(reward=Unborn()),
        lambda: setup(metrics=Unborn()),
        lambda: Metrics([Unborn()]),
        lambda: WeightedSum({"first": Unborn()}),
    ],
)
def test_of_a_part_that_forgets_its_base(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=r"Unborn: its __init__ must begin with super\(\)"):
        make()


def test_of_its_subclasses() -> None:
    with pytest.raises(BadArgument, match="DDPO: advantage is a list; give a"):
        setup(DDPO, advantage=[1])

    class Settings(TypedDict):
        depth: int

    class Own(GRAFT):
        """Keeps something else under the names of its arguments."""

        def __init__(self, *args: Any, teacher: str, gamma: int, more: Settings, **base: Any):
            super().__init__(*args, **base)
            self.teacher, self.gamma, self.more = nn.Linear(2, len(teacher)), gamma / 2, more

    own: Any = {"teacher": "file", "gamma": 3, "more": {"depth": 1}}
    setup(Own, **own)
    with pytest.raises(BadArgument, match=r"Own: num_epochs must be a whole number, got 1\.5"):
        setup(Own, **own, num_epochs=1.5)


@pytest.mark.parametrize("kind", [WeightedSum, Product])
def test_of_combinations(kind: Any) -> None:
    name = kind.__name__
    with pytest.raises(BadArgument, match=f"{name}: rewards is a list; give a dict of rewards"):
        kind([Coordinate()])
    for part, said in ((first, "a function"), (nn.Linear(2, 1), "a Linear"), (3, "3")):
        with pytest.raises(BadArgument) as caught:
            kind({"b": Coordinate(), "a": part})
        assert str(caught.value) == f"{name}: rewards['a'] is {said}; {REWARD}"
    kind(nn.ModuleDict({"a": Coordinate()}))


def test_of_metrics() -> None:
    wrong: Any = nn.Linear(2, 1)
    with pytest.raises(BadArgument, match=r"Metrics: parts\[1\] is a Linear; give a lit_rlft"):
        Metrics([Coordinate(), wrong])
    with pytest.raises(BadArgument, match="Metrics: parts is a Coordinate; give a list"):
        Metrics(Coordinate())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [lambda: Sampler(num_steps=4.5), lambda: TopK(1.5), lambda: LoRA(rank=2.0)],  # type: ignore
)
def test_whole_numbers_of_other_classes(make: Any) -> None:
    with pytest.raises(BadArgument, match="must be a whole number, got"):
        make()


def test_numbers_of_a_setting_with_parts() -> None:
    class Own:
        def __init__(self, sizes: tuple[int, int], shares: dict[int, float]) -> None:
            at_least(0, self, sizes=sizes, shares=shares)

    Own((1, 2), {1: 0.5})
    with pytest.raises(UsageError, match="Own: sizes must be a whole number, got 2"):
        Own((1, 2.5), {})  # type: ignore[arg-type]


def test_of_kind_names_what_was_given() -> None:
    of_kind(GRAFT, "x", int, "give one", 3)
    for value, said in ((torch.nn.Linear, "the class Linear"), (None, "None"), ("a", "'a'")):
        with pytest.raises(BadArgument) as caught:
            of_kind(GRAFT, "x", int, "give one", value)
        assert str(caught.value) == f"GRAFT: x is {said}; give one"
