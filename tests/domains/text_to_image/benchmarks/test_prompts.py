"""The benchmarks' files: the published ones whole, small ones with one mistake each."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domains.text_to_image.benchmarks import (
    DrawBenchPrompts,
    GenEval2Prompts,
    GenEvalPrompts,
    HPDv2Prompts,
    PartiPrompts,
    T2ICompBenchPrompts,
)
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import SplitData, collate

PUBLISHED = Path(__file__).parents[4] / ".." / "shared" / "data" / "prompts"
needs_files = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
GOOD = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two cows"}


def rows(data: SplitData, split: Any = "test") -> list[dict[str, Any]]:
    data.setup("test")
    dataset = data.rows(split)
    return [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]


@needs_files
def test_geneval_as_published() -> None:
    data = GenEvalPrompts(str(PUBLISHED / "geneval_metadata.jsonl"), num_val_prompts=12)
    found = rows(data)
    assert Counter(row["tag"] for row in found) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    first = {"index": 0, "prompt": "a photo of a bench", "tag": "single_object"}
    assert found[0] == first | {"include": [{"class": "bench", "count": 1}], "exclude": None}
    # A few prompts are of all tasks, although the file is sorted.
    assert len({row["tag"] for row in rows(data, "val")}) == 6
    assert set(collate(found)) == {"index", "prompt", "tag", "include", "exclude"}


@needs_files
def test_t2i_compbench_as_published() -> None:
    data = T2ICompBenchPrompts(str(PUBLISHED))
    found = rows(data)
    assert set(Counter(row["category"] for row in found).values()) == {300}
    assert len(found) == 2400 and len(rows(data, "train")) == 5600
    few = rows(T2ICompBenchPrompts(str(PUBLISHED), ["spatial"], num_test_prompts=7))
    assert [row["category"] for row in few] == ["spatial"] * 7


@needs_files
def test_parti_prompts_as_published() -> None:
    found = rows(PartiPrompts(str(PUBLISHED / "parti_prompts.tsv")))
    assert len(found) == 1632 and len({row["category"] for row in found}) == 12
    assert found[0] == {"index": 0, "prompt": "bond", "category": "Abstract", "challenge": "Basic"}
    assert sum(row["prompt"].startswith('"G I G G L E" painted') for row in found) == 1


def test_drawbench(tmp_path: Path) -> None:
    path = tmp_path / "drawbench.csv"
    path.write_text('Prompts,Category\r\n"A red, ""round""\ncar.",Colors\r\nTwo cats.,Counting\r\n')
    assert rows(DrawBenchPrompts(str(path))) == [
        {"index": 0, "prompt": 'A red, "round"\ncar.', "category": "Colors"},
        {"index": 1, "prompt": "Two cats.", "category": "Counting"},
    ]


def hpdv2(folder: Path) -> HPDv2Prompts:
    for style in ("anime", "concept-art", "paintings", "photo"):
        texts = [f"{style} {i}" for i in range(3)]
        (folder / f"{style}.json").write_text(json.dumps(texts, indent=1))
    return HPDv2Prompts(str(folder))


def test_hpdv2(tmp_path: Path) -> None:
    found = rows(hpdv2(tmp_path))
    assert len(found) == 12
    assert found[4] == {"index": 4, "prompt": "concept-art 1", "style": "concept-art"}


def test_complex_prompts_have_their_relations(tmp_path: Path) -> None:
    (tmp_path / "complex_val.txt").write_text("A by b.\nThe cat sat.\nBoth.\n")
    (tmp_path / "complex_val_spatial.txt").write_text("a by B.\n")
    (tmp_path / "complex_val_action.txt").write_text("the cat sat\n")
    found = rows(T2ICompBenchPrompts(str(tmp_path), ["complex"]))
    assert [row["relation"] for row in found] == ["spatial", "action", None]


def geneval(**change: Any) -> str:
    return json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(GOOD) + "\n\n{'tag'\n", "line 3 of .* is no JSON"),
        (geneval(prompt=None), "line 3 of .* has no 'prompt'"),
        (geneval(prompt=" "), "line 3 of .* has an empty 'prompt'"),
        (geneval(tag="colour"), "line 3 of .* has the tag 'colour', not one of single_object"),
        (geneval(include=[]), "line 3 of .* has nothing under 'include'"),
        (geneval(include="cow"), "line 3 of .* has no list under 'include'"),
        (geneval(exclude=[{"count": 1}]), "has under 'exclude' a clause without 'class'"),
        (geneval(include=[{"class": "cow", "count": 0}]), "the count 0, not a number from 1"),
        (
            geneval(include=[{"class": "cow", "count": 1, "color": "beige"}]),
            "the colour 'beige', not one of red",
        ),
        (
            geneval(include=[{"class": "cow", "count": 1, "position": ["above", 0]}]),
            r"the position \['above', 0\], not \[relation, an earlier clause\]",
        ),
        ("\n \n", "holds no prompts"),
    ],
)
def test_damaged_files_of_geneval(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "geneval.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"^\\w+: source cannot be used: .*{problem}"):
        GenEvalPrompts(str(path)).setup("test")


def geneval2(**change: Any) -> Callable[[Path], SplitData]:
    record = {"prompt": "two cats", "atom_count": 3, "skills": ["object", "count"]}
    record |= {"vqa_list": [["Is there a cat?", "Yes"], ["How many cats are there?", "two"]]}

    def made(folder: Path) -> SplitData:
        path = folder / "geneval2.jsonl"
        path.write_text(json.dumps(record) + "\n" + json.dumps(record | change) + "\n")
        return GenEval2Prompts(str(path))

    return made


def test_geneval_2(tmp_path: Path) -> None:
    first, second = rows(geneval2(prompt=" a dog ", atom_count=2)(tmp_path))
    questions = [["Is there a cat?", "Yes"], ["How many cats are there?", "two"]]
    asked = {"vqa_list": questions, "skills": ["object", "count"]}
    assert first == {"index": 0, "prompt": "two cats", "atom_count": 3} | asked
    assert second == {"index": 1, "prompt": "a dog", "atom_count": 2} | asked
    assert collate([first, second])["vqa_list"] == [questions, questions]


def parti(text: str) -> Callable[[Path], SplitData]:
    def made(folder: Path) -> SplitData:
        (folder / "p.tsv").write_text(text)
        return PartiPrompts(str(folder / "p.tsv"))

    return made


def drawbench(text: str) -> Callable[[Path], SplitData]:
    def made(folder: Path) -> SplitData:
        (folder / "d.csv").write_text(text)
        return DrawBenchPrompts(str(folder / "d.csv"))

    return made


def style(text: str) -> Callable[[Path], SplitData]:
    def made(folder: Path) -> SplitData:
        data = hpdv2(folder)
        (folder / "photo.json").write_text(text)
        return data

    return made


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (geneval2(prompt=""), "line 2 of .* has an empty 'prompt'"),
        (geneval2(vqa_list=None), "line 2 of .* has no questions under 'vqa_list'"),
        (geneval2(skills=None), "line 2 of .* has not one skill for each of its 2 questions"),
        (geneval2(vqa_list=[["Is there a cat?"]]), "line 2 of .*, not a question and its answer"),
        (geneval2(atom_count=None), "line 2 of .* has no whole number under 'atom_count'"),
        (parti("Text\tCategory\tChallenge\n"), "line 1 of .* names no column 'Prompt'"),
        (parti("Prompt\tCategory\tChallenge\na\tb\tc\nd\te\n"), "line 3 of .* has no challenge"),
        (parti("Prompt\tCategory\tChallenge\n"), "p.tsv holds no prompts"),
        (drawbench('Prompts,Category\n"a\nb",c\nd\n'), "line 4 of .* has no category"),
        (drawbench('Prompts,Category\na,b\n"c,d\n'), "line 3 of .* cannot be read"),
        (style('["a",\n "b"'), "line 2 of .*photo.json is no JSON"),
        (style('{"a": 1}'), "line 1 of .*photo.json holds no list of prompts"),
        (style('["a", 3]'), "entry 2 of .*photo.json is no text"),
        (lambda folder: HPDv2Prompts(str(folder)), "there is no file .*anime.json"),
        (lambda folder: T2ICompBenchPrompts(str(folder)), "there is no file .*color_val.txt"),
    ],
)
def test_damaged_files(make: Callable[[Path], SplitData], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^\\w+: source cannot be used: .*{problem}"):
        make(tmp_path).setup("test")


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"categories must be among .*, got 'colour'"):
        T2ICompBenchPrompts(str(tmp_path), ["colour"])
    with pytest.raises(UsageError, match="styles must name at least one"):
        HPDv2Prompts(str(tmp_path), [])
    with pytest.raises(UsageError, match="HPDv2Prompts has prompts to test on and none to train"):
        hpdv2(tmp_path).setup("fit")
