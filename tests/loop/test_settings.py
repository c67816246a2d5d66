"""What tells the settings of two runs apart, and what is the same under other names."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rdkit import Chem
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from domains.layout.data import LayoutData
from domains.layout.rewards import ClassCounts
from domains.layout.sources.generated import Grammar
from domains.molecule.data import AtomCounts
from domains.molecule.rewards import Substructures
from domains.text_to_image.data import PromptData, ShapesPrompts
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.selection import Selection
from lit_rlft.core.settings import Recorded, settings
from lit_rlft.loop.settings import ABSENT, changes
from lit_rlft.loop.side.rewards import RewardWorkers, SideReward

LAYOUTS = partial(LayoutData, Grammar())


def weighted(**more: Any) -> WeightedSum:
    return WeightedSum({"a": Coordinate()}, **more)


@pytest.mark.parametrize(
    ("make", "before", "now", "keys"),
    [
        (MixtureData, {}, {"num_train": 256}, ["x.num_train"]),
        (MixtureData, {}, {"stds": (0.2, 0.25, 0.2, 0.25, 0.3)}, ["x.stds.4"]),
        (PromptData, {"source": "a.txt"}, {"source": "b.txt"}, ["x.source"]),
        (PromptData, {"source": "a.csv"}, {"source": "a.csv", "column": "text"}, ["x.column"]),
        (LAYOUTS, {}, {"num_train": 9}, ["x.num_train"]),
        (LAYOUTS, {}, {"val_fraction": 0.5}, ["x.val_fraction"]),
        (LAYOUTS, {}, {"test_source": Grammar()}, ["x.test_source"]),
        (LayoutData, {"source": Grammar()}, {"source": Grammar(8)}, ["x.source.num_pages"]),
        (LAYOUTS, {"tasks": {"category": 1.0}}, {"tasks": {"category": 0.5}}, ["x.tasks.category"]),
        (AtomCounts, {}, {"num_train": 9}, ["x.num_train"]),
        (ShapesPrompts, {}, {"num_train_prompts": 9}, ["x.num_train_prompts"]),
        (Quadratic, {}, {"center": [0.0, 1.0]}, ["x.center.1"]),
        (
            Substructures,
            {"present": ["C"]},
            {"present": ["C", "N"]},
            ["x.present.1", "x.present.length"],
        ),
        (ClassCounts, {"counts": {"text": 1}}, {"counts": {"text": 2}}, ["x.counts.text"]),
        (ClassCounts, {"counts": {"text": 1}}, {"counts": {"title": 1}}, "text title"),
        (weighted, {}, {"limits": {"a": (None, 5.0)}}, ["x.limits.a.0", "x.limits.a.1"]),
        (weighted, {"ranges": {"a": (0.0, 5.0)}}, {}, ["x.ranges.a.0", "x.ranges.a.1"]),
    ],
)
def test_every_argument_tells_two_runs_apart(
    make: Callable[..., Any], before: dict[str, Any], now: dict[str, Any], keys: Any
) -> None:
    wanted = [f"x.counts.{name}" for name in keys.split()] if isinstance(keys, str) else keys
    first, second = (settings(make(**given), "x") for given in (before, now))
    assert [key for key, *_ in changes(first, second)] == wanted
    assert [(b, a) for _, a, b in changes(second, first)] == [
        (a, b) for _, a, b in changes(first, second)
    ]
    assert changes(first, settings(make(**before), "x")) == []


class Plain(Recorded):
    def __init__(self, size: int, *names: str, scale: float = 1.0, **more: Any) -> None:
        self.kept = size, names, scale, more


class Scaled(Plain):
    def __init__(self, size: int = 3, **more: Any) -> None:
        super().__init__(size, **more)


class Centred(Recorded):
    def __init__(self, center: list[float], cut: float | None = None) -> None:
        self.center = torch.tensor(center)
        self.cut = None if cut is None else torch.tensor(cut)


def test_arguments_are_recorded_however_they_are_given() -> None:
    """By place or by name, or not at all: a command line gives every default by name."""
    same = [Scaled(), Scaled(3), Scaled(size=3, scale=1.0), Scaled(scale=1.0)]
    found = [settings(one, "x") for one in same]
    assert all(changes(found[0], other) == [] for other in found[1:])
    assert found[0]["x.scale"] == 1.0
    (change,) = changes(found[0], settings(Scaled(scale=2.0), "x"))
    assert change == ("x.scale", 1.0, 2.0)
    for twin in (copy.deepcopy(same[1]), pickle.loads(pickle.dumps(Scaled(5)))):
        assert settings(twin, "x")["x.size"] in (3, 5)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Plain()  # type: ignore[call-arg]


def test_what_a_tensor_was_made_of_is_compared() -> None:
    first = settings(Centred([0.0, 1.0]), "x")
    assert [key for key, *_ in changes(first, settings(Centred([0.0, 2.0]), "x"))] == [
        "x.center.given.1"
    ]
    assert changes(settings(Centred([0.0], 1.0), "x"), settings(Centred([0.0], 2.0), "x")) == [
        ("x.cut.given", 1.0, 2.0)
    ]


def test_long_arguments_are_told_apart_by_one_value() -> None:
    found = [settings(Scaled(prompts=[str(i + n) for i in range(1000)]), "x") for n in (0, 1)]
    assert max(map(len, found)) < 10
    assert [key for key, *_ in changes(*found)] == ["x.prompts"]


def test_a_reward_beside_is_the_reward_that_it_stands_for() -> None:
    beside = SideReward(Quadratic([0.0, 1.0]), RewardWorkers(), None)
    assert settings(beside, "x") == settings(Quadratic([0.0, 1.0]), "x")


class Silent(Reward):
    """A user's reward that keeps nothing under the names of its arguments."""

    def __init__(self, strength: float, file: Path | None = None) -> None:
        super().__init__()
        self._inner = strength, file

    def forward(self, samples: Any, condition: Condition) -> torch.Tensor:
        return torch.zeros(len(condition))


def test_a_users_reward_needs_no_attributes_of_those_names() -> None:
    first, second = settings(Silent(1.0), "reward"), settings(Silent(2.0, Path("a")), "reward")
    assert changes(first, second) == [("reward.file", None, "a"), ("reward.strength", 1.0, 2.0)]


def test_what_an_earlier_version_did_not_name_is_no_change() -> None:
    """It named attributes alone, and no lengths of what has its parts by name."""
    now = settings(weighted(weights={"a": 2.0}), "reward") | settings(MixtureData(), "data")
    old = {"reward", "reward.weights.a", "reward.normalize", "data", "data.batch_size"}
    assert old <= now.keys() and "data.num_train" in now
    assert changes({key: now[key] for key in old}, now) == []
    other = settings(weighted(weights={"a": 3.0}), "reward")
    assert changes({key: now[key] for key in old}, other) == [("reward.weights.a", 2.0, 3.0)]


def test_below_another_class_nothing_is_compared() -> None:
    first = {"x": "a.A", "x.one": 1, "x.both": 1, "x.all.a": 1}
    second = {"x": "a.B", "x.two": 2, "x.both": 2, "x.all.b": 1}
    assert changes(first, second) == [("x", "a.A", "a.B")]
    assert changes(first, second | {"x": "a.A"}) == [
        ("x.all.a", 1, ABSENT),
        ("x.all.b", ABSENT, 1),
        ("x.both", 1, 2),
    ]
    assert str(ABSENT) == "not set"


class Named(Reward):
    """Keeps its arguments under other names."""

    def __init__(self, reference: Any = None, api_key: str = "", cls: int = 0) -> None:
        super().__init__()
        self._reference, self._key, self._cls = reference, api_key, cls

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.zeros(len(condition))


def test_what_python_knows_nothing_of_is_no_obstacle() -> None:
    """As classes that are written in C++ and say nothing of their arguments."""
    molecule = Chem.MolFromSmiles("CO")  # type: ignore[attr-defined,no-untyped-call]
    found = settings(Named(molecule, cls=3), "x")
    assert found["x.cls"] == 3 and found["x.reference"] == "rdkit.Chem.rdchem.Mol"


def test_secrets_are_hidden() -> None:
    assert settings(Named(api_key="hunter2"), "x")["x.api_key"] == "(hidden)"
    assert settings(Named(), "x")["x.api_key"] == ""
    found = settings(Named("http://host/score?key=abc&n=2"), "x")
    assert found["x.reference"] == "http://host/score?key=(hidden)&n=2"
    assert not changes(found | {"x.reference": "http://host/score?key=abc&n=2"}, found)


class Base(Reward):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self._scale = scale

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.zeros(len(condition))


class Passing(Base):
    def __init__(self, *args: Any, extra: int = 1, **base: Any) -> None:
        super().__init__(*args, **base)


def test_a_default_is_not_recorded_where_something_may_have_been_given() -> None:
    assert settings(Passing(scale=5.0), "x")["x.scale"] == 5.0
    assert "x.scale" not in settings(Passing(5.0), "x")
    assert settings(Passing(), "x")["x.scale"] == 1.0


@dataclass(frozen=True, slots=True)
class Slotted(Selection):
    k: int = 2

    def __call__(self, rewards: Tensor, keys: Any = None, noise: Any = None) -> Tensor:
        return rewards > self.k


def test_copies_have_the_settings_of_the_original() -> None:
    for made in (Slotted(3), Named(cls=3)):
        assert settings(copy.deepcopy(made), "x") == settings(made, "x")
