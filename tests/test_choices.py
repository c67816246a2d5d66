"""A setting that takes one of a few words refuses every other word, also from Python."""

import importlib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest

from domains.text_to_image.data import ShapesPrompts
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.cli.index import Entry, index
from lit_rlft.core.checks import BadArgument, one_of
from lit_rlft.core.schedule import vp_betas
from lit_rlft.loop.reference import LoRA
from tests.test_settings import LIGHTNINGS, arguments, make

INTERNAL = {
    "CLIPT5Config", "Call", "Preprocessing", "Reference",
}  # fmt: skip
"""Made by other classes, from settings that those have checked."""

WRONG = "misspelt"

MORE: dict[str, dict[str, Any]] = {
    "CLIPEncoder": {"pretrained": "shapes_clip"},
    "DiscreteVP": {"betas": vp_betas()},
}
"""What classes need beside the arguments of `NEEDED`."""


def cases() -> Iterator[Any]:
    for entry in index():
        if entry.name in INTERNAL | LIGHTNINGS:
            continue
        cls = getattr(importlib.import_module(entry.module), entry.name)
        for name, (kind, _) in arguments(cls).items():
            if literals(kind):
                yield pytest.param(entry, cls, name, kind, id=f"{entry.path}.{name}")


def literals(kind: Any) -> list[Any]:
    """Return the choices within an annotation."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [choice for part in typing.get_args(kind) for choice in literals(part)]


def formed(kind: Any) -> Any:
    """Return a word that is no choice, in the form that the argument takes."""
    origin = typing.get_origin(kind)
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        return formed(next(part for part in typing.get_args(kind) if literals(part)))
    return [WRONG] if origin is not Literal and issubclass(origin, Sequence) else WRONG


CASES = list(cases())


@pytest.mark.parametrize(("entry", "cls", "name", "kind"), CASES)
def test_a_misspelt_choice_is_refused(entry: Entry, cls: type, name: str, kind: Any) -> None:
    if entry.name == "XTB":
        pytest.importorskip("tblite")
    needed = MORE.get(entry.name, {})
    with pytest.raises(BadArgument, match=re.escape(f"{name} is '{WRONG}'; use ")) as caught:
        make(cls, entry.path, {**needed, name: formed(kind)})
    assert caught.value.argument == name
    for choice in literals(kind):
        assert repr(choice) in caught.value.problem


def test_there_are_such_settings() -> None:
    assert len(CASES) > 80
    assert {entry.name for entry in index()} >= INTERNAL


def test_a_task_that_does_not_exist_is_named() -> None:
    with pytest.raises(BadArgument, match="ShapesPrompts: train_tasks is 'colour'; use 'single_"):
        ShapesPrompts(train_tasks=["colors", "colour"])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["estimator", "log_prob_reduction", "gradient_checkpointing"])
@pytest.mark.parametrize("value", [True, 1, 0.5, ("mean",)])
def test_values_of_another_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(BadArgument, match=f"DDPO: {name} is "):
        make(DDPO, "lit_rlft.DDPO", {name: value})


def test_a_word_has_to_be_given_where_nothing_has_no_meaning() -> None:
    with pytest.raises(BadArgument, match="DDPO: estimator is None; use 'importance_sampling'"):
        make(DDPO, "lit_rlft.DDPO", {"estimator": None})
    make(DDPO, "lit_rlft.DDPO", {"gradient_checkpointing": None})


def test_steps_are_for_reward_gradients_alone() -> None:
    problem = "DDPO: gradient_checkpointing is 'steps'; use 'blocks' or None"
    with pytest.raises(BadArgument, match=problem):
        make(DDPO, "lit_rlft.DDPO", {"gradient_checkpointing": "steps"})
    make(RewardGradient, "lit_rlft.RewardGradient", {"gradient_checkpointing": "steps"})


@pytest.mark.parametrize("value", [1, 0, "no", "true", None])
def test_merging_is_a_bool_or_auto(value: Any) -> None:
    with pytest.raises(BadArgument, match="LoRA: merge_for_sampling is "):
        LoRA(merge_for_sampling=value)


def test_functions_refuse_them_as_well() -> None:
    problem = "vp_betas: kind is 'cosine'; use 'linear' or 'scaled_linear'"
    with pytest.raises(BadArgument, match=problem):
        vp_betas(kind="cosine")  # type: ignore[arg-type]


def test_one_of_names_all_choices() -> None:
    one_of(Setting(), "it", ("a", None), None)
    one_of(Setting(), "it", ("auto",), 3, others="a number")
    problem = "Setting: it is 'c'; use 'a', 'b' or a number"
    with pytest.raises(BadArgument, match=problem):
        one_of(Setting(), "it", ("a", "b"), others="a number")
    with pytest.raises(BadArgument, match=r"Setting: it is \['a'\]; use 'a'$"):
        one_of(Setting(), "it", ("a",), ["a"])


class Setting:
    it = "c"
