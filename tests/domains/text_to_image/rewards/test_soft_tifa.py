"""Soft-TIFA by hand, and on a tiny model of a real class."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from domains.text_to_image.rewards import SoftTIFA
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition
from tests.domains.text_to_image.rewards.published import llava_folder

TWO = [["How many dogs are there?", "two"], ["Is a dog red?", "Yes"]]
CAT = [["Is there a cat?", "yes"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(llava_folder(tmp_path_factory.mktemp("llava")))


def condition(*asked: Any) -> Condition:
    entries = [{"prompt": f"prompt {i}", "vqa_list": own} for i, own in enumerate(asked)]
    return Condition(entries, {}, torch.arange(len(entries)))


class Words:
    """A tokenizer that parts some texts in two, one of them into a blank and a digit."""

    KNOWN: ClassVar[dict[str, list[int]]] = {
        **{"Yes": [3], " Yes": [4], "yes": [5], " yes": [6, 7]},
        **{"two": [8], "Two": [8, 1], "2": [9], " two": [10], " Two": [8], " 2": [0, 9]},
    }

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.KNOWN.get(text, [])

    def decode(self, ids: list[int]) -> str:
        return " " if ids == [0] else "word"


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("geometric", [(27 / 66 * 18 / 66) ** 0.5, 18 / 66]),
        ("arithmetic", [(27 / 66 + 18 / 66) / 2, 18 / 66]),
    ],
)
def test_answers_count_by_the_first_tokens_of_their_spellings(
    folder: str, monkeypatch: pytest.MonkeyPatch, average: Any, expected: list[float]
) -> None:
    """P of token i is i / 66: "two" is 8, 9 or 10, "Yes" 3, 4, 5 or 6, and the blank is none."""
    reward, seen = SoftTIFA(folder, average, batch_size=2, dtype="float32"), []

    def answers(pictures: Tensor, questions: list[str]) -> Tensor:
        seen.extend(zip(pictures[:, 0, 0, 0].tolist(), questions, strict=True))
        return (torch.arange(12).double() / 66).log().expand(len(questions), -1)

    monkeypatch.setattr(reward.network, "answers", answers)
    monkeypatch.setattr(reward.network.reader, "tokenizer", Words())
    pictures = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(2, 3, 28, 28)
    assert reward(pictures, condition(TWO, CAT)).tolist() == pytest.approx(expected)
    assert seen == [
        (0.25, "How many dogs are there? Answer in one word."),
        (0.25, "Is a dog red? Answer in one word."),
        (0.5, "Is there a cat? Answer in one word."),
    ]
    with pytest.raises(UsageError, match="no token for 'three'"):
        reward(pictures[:1], condition([["How many?", "three"]]))


def test_a_model_of_transformers_is_asked_and_gradients_are_its_own(folder: str) -> None:
    reward = SoftTIFA(folder, dtype="float32")
    asked = [["Is it red?", "Yes"], ["Is it a dog?", "Yes"]]
    pictures = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    pictures.requires_grad_()
    assert reward.differentiable
    found = reward(pictures, condition(asked, asked[:1]))
    tokens = reward._tokens("Yes")
    assert reward.network.token("Yes") in tokens
    questions = [f"{question} Answer in one word." for question, _ in asked]
    with torch.no_grad():
        rows = reward.network.answers(pictures[[0, 0, 1]], [*questions, questions[0]])
    p = rows[:, tokens].exp().sum(dim=1)
    torch.testing.assert_close(found.detach(), torch.stack([(p[0] * p[1]).sqrt(), p[2]]))
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    assert reward(pictures[:0], condition()).shape == (0,)


@pytest.mark.parametrize(
    ("questions", "problem"),
    [
        (None, "has no questions under 'vqa_list'"),
        ([], "has no questions"),
        ([["Is it red?"]], "not a question and its answer"),
        ([["Is it red?", ""]], "not a question and its answer"),
    ],
)
def test_prompts_without_questions_are_named(folder: str, questions: Any, problem: str) -> None:
    reward = SoftTIFA(folder, dtype="float32")
    with pytest.raises(UsageError, match=f"the prompt 'prompt 0' .*{problem}.*give a .jsonl"):
        reward(torch.rand(1, 3, 28, 28), condition(questions))


def test_impossible_settings_are_refused(folder: str) -> None:
    with pytest.raises(BadArgument, match="template"):
        SoftTIFA(folder, template="Answer in one word.", dtype="float32")
    with pytest.raises(BadArgument, match="average is 'harmonic'; use 'geometric' or 'arithmetic'"):
        SoftTIFA(folder, "harmonic", dtype="float32")  # type: ignore[arg-type]
