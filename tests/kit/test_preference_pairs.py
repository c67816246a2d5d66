"""PreferencePairs: what is held out, what is refused, and the samples of every domain read back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.image.pipeline import ImagePipeline
from domains.layout.conditions import condition_row
from domains.layout.data import LayoutData
from domains.layout.networks.transformer import Architecture as LayoutArchitecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar
from domains.molecule.networks import Architecture as MoleculeArchitecture
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.samples import Molecules
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import PAIR, Pipeline
from lit_rlft.core.state import leaves, tensor_of
from lit_rlft.kit.data import collate
from lit_rlft.kit.preference_pairs import PreferencePairs, held_out
from lit_rlft.kit.preferences import Pair, preference_line
from lit_rlft.loop.pairs import PairStates


def pair(chosen: Any, rejected: Any, line: int = 1) -> Pair:
    return Pair({}, chosen, rejected, ".", line)


def test_what_is_held_out_shares_no_sample_with_the_rest() -> None:
    pairs = [pair(f"{i}a", f"{i}{b}") for i in range(20) for b in "bcd"]
    out = held_out(pairs, 0.2, seed=0)
    assert len(out) == 12 and out == held_out(pairs, 0.2, seed=0)
    groups = {pairs[i].chosen for i in out}
    assert all((own.chosen in groups) == (i in out) for i, own in enumerate(pairs))
    assert out != held_out(pairs, 0.2, seed=1)
    # A chain of samples hangs together.
    assert len(held_out([pair("a", "b"), pair("b", "c"), pair("d", "c")], 0.1, seed=0)) == 3
    assert not held_out(pairs, 0.0, seed=0)


def data_of(folder: Path, lines: list[str], pipeline: Pipeline, **settings: Any) -> PreferencePairs:
    path = folder / "votes.jsonl"
    path.write_text("".join(lines))
    data = PreferencePairs(str(path), **settings)
    module = SimpleNamespace(pipeline=pipeline)
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)  # type: ignore[assignment]
    return data


POINTS = [preference_line({}, [float(i), 0.0], [0.0, float(-i)]) for i in range(1, 11)]


def test_rows_are_conditions_with_their_pairs(tmp_path: Path) -> None:
    data = data_of(tmp_path, POINTS, GaussianMixturePipeline(), val_fraction=0.3)
    data.setup("fit")
    train, val = (data.rows(split) for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    lines = {row[PAIR].line for rows in (train, val) for row in (rows[i] for i in range(len(rows)))}
    assert lines == set(range(1, 11))
    own = data_of(tmp_path, POINTS, GaussianMixturePipeline(), val_file=str(tmp_path / "v.jsonl"))
    (tmp_path / "v.jsonl").write_text(POINTS[0])
    own.setup("fit")
    assert (len(own.rows("train")), len(own.rows("test"))) == (10, 1)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([*POINTS, '{"chosen": [1, 2, 3], "rejected": [1, 2]}\n'], "line 11: chosen: a point is"),
        ([*POINTS, '{"chosen": [1, 2], "rejected": [NaN, 2]}\n'], "line 11: rejected: a point is"),
        (POINTS[:1], "1 pairs, of which 1 would be held out; change data.init_args.val_fraction"),
    ],
)
def test_samples_are_read_before_a_fit(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        data_of(tmp_path, lines, GaussianMixturePipeline()).setup("fit")


def test_without_a_model_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_text("".join(POINTS))
    with pytest.raises(UsageError, match=r"trainer.fit\(model, data\)"):
        PreferencePairs(str(tmp_path / "votes.jsonl")).setup("fit")


def layouts() -> LayoutPipeline:
    torch.manual_seed(0)
    small = LayoutArchitecture(width=8, depth=1, num_heads=2)
    return LayoutPipeline(None, architecture=small)


def test_a_layout_comes_back_under_its_condition(tmp_path: Path) -> None:
    """What `predict` writes of the sample and of the condition gives the same state and columns."""
    pipeline = layouts()
    classes, tasks = pipeline.classes, {"completion": 1.0, "category_size": 1.0, "category": 1.0}
    data = LayoutData(Grammar(60), tasks=tasks, val_fraction=0.1)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    condition = pipeline.encode(batch)
    samples = Layouts.of(batch["boxes"], batch["labels"], classes)
    names = [f"{i}" for i in range(len(condition))]
    assert len(names) > 4 and batch["known_labels"].any()
    paths = pipeline.save_samples(samples, condition, tmp_path, names)
    entries = [json.loads(json.dumps(entry)) for entry in condition.each()]
    read = [
        pipeline.read_sample(path.name, entry, tmp_path)
        for path, entry in zip(paths, entries, strict=True)
    ]
    columns = collate([{"index": i, **row} for i, row in enumerate(read)])
    for key in ("known_boxes", "known_labels", "labels"):
        assert torch.equal(columns[key], batch[key])
    assert columns["task"] == batch["task"]
    torch.testing.assert_close(columns["boxes"], batch["boxes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(pipeline.states(columns), pipeline.states(batch), atol=2e-4, rtol=0)
    assert pipeline.encode(columns).each() == condition.each()
    inline = json.loads(paths[0].read_text())
    again = pipeline.read_sample(inline, entries[0], tmp_path)
    assert torch.equal(again["boxes"], read[0]["boxes"])


def test_what_is_no_layout_of_the_condition_is_refused(tmp_path: Path) -> None:
    pipeline = layouts()
    box = {"label": pipeline.classes[0], "box": [0, 0, 5, 5]}
    page = {"canvas": [10, 10], "elements": [box]}
    (tmp_path / "picture.png").write_bytes(bytes(range(256)))
    given = {
        "task": "completion",
        "given": [{"label": pipeline.classes[0], "centre_and_size": [0.9, 0.25, 0.5, 0.5]}],
    }
    for sample, entry, words in (
        (page, given, "does not have what its condition gives"),
        ({**page, "elements": [{**box, "label": "poem"}]}, {}, "element 0 is a 'poem'"),
        ({**page, "elements": [box] * 13}, {}, "13 elements, the model 12"),
        ({"elements": [box]}, {}, "no readable layout"),
        ("picture.png", {}, "no readable layout"),
        ({**page, "canvas": [0, 10]}, {}, "canvas of 0"),
        ({**page, "elements": [{**box, "box": [0, 0]}]}, {}, "not finite"),
        (page, {"task": "poem"}, "none of a layout"),
        (page, {"given": [{"label": "poem", "centre_and_size": [0, 0, 0, 0]}]}, "gives a 'poem'"),
        (page, {"given": [1]}, "given element is none"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline.read_sample(sample, entry, tmp_path)
    given["given"][0]["centre_and_size"][0] = 0.25
    assert pipeline.read_sample(page, given, tmp_path)["labels"].tolist()[:2] == [0, -1]
    assert not condition_row({}, pipeline.classes, 12)["known_labels"].any()


def test_a_molecule_comes_back(tmp_path: Path) -> None:
    """Also one that no data set would have: hydrogens alone, far apart."""
    small = MoleculeArchitecture(network="transformer", width=16, depth=1, max_atoms=4)
    pipeline = MoleculePipeline(None, architecture=small)
    positions = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)) * 3
    types = torch.tensor([[1, 0, 0, 0], [0, 0, 2, -1]])
    entries = [{"num_atoms": 4}, {"num_atoms": 3}]
    samples = Molecules.of(positions, types, pipeline.elements)
    condition = pipeline.encode({"num_atoms": torch.tensor([4, 3])})
    paths = pipeline.save_samples(samples, condition, tmp_path, ["a", "b"])
    for i, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        n = entry["num_atoms"]
        own = positions[i, :n] - positions[i, :n].mean(dim=0)
        inline = {
            "symbols": [pipeline.elements[k] for k in types[i, :n].tolist()],
            "positions": positions[i, :n].tolist(),
        }
        xyz = "".join(f"{s} {x} {y} {z}\n" for s, (x, y, z) in zip(*inline.values(), strict=True))
        (tmp_path / "c.xyz").write_text(f"{n}\n\n{xyz}")
        for sample in (path.name, inline, "c.xyz"):
            row = pipeline.read_sample(sample, entry, tmp_path)
            assert torch.equal(row["types"], types[i])
            torch.testing.assert_close(row["positions"][:n], own, atol=2e-4, rtol=0)
    for sample, entry, words in (
        (paths[0].name, {"num_atoms": 3}, "4 atoms, its condition's num_atoms is 3"),
        (paths[0].name, {}, "condition must be"),
        ({"symbols": ["Xe"], "positions": [[0, 0, 0]]}, {"num_atoms": 1}, "atoms of Xe"),
        ({"symbols": ["C"], "positions": [[0, 0]]}, {"num_atoms": 1}, "as many symbols"),
        ("a.smi", {"num_atoms": 4}, "no .sdf or .xyz"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline.read_sample(sample, entry, tmp_path)
    # A rotation is drawn on the way: the same one in any order of rows.
    states = [PairStates(pipeline, 0) for _ in range(2)]
    pairs = [Pair(entries[0], "a.sdf", inline_of(4), str(tmp_path), i) for i in (1, 2)]
    whole = states[0].of([5, 6], pairs)
    for i in (1, 0):
        for a, b in zip(whole, states[1].of([5 + i], pairs[i : i + 1]), strict=True):
            for leaf, other in zip(leaves(a), leaves(b), strict=True):
                assert torch.equal(leaf[i : i + 1], other)


def inline_of(n: int) -> dict[str, Any]:
    return {"symbols": ["C"] * n, "positions": [[float(i), 0.0, 0.0] for i in range(n)]}


def test_pictures_come_back_at_the_models_size(tmp_path: Path) -> None:
    pipeline = ImagePipeline("digits")
    height, width = pipeline.image_size
    pixels = torch.randint(0, 256, (height, width), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    Image.new("RGB", (3 * width, 2 * height), (255, 0, 0)).save(tmp_path / "b.jpg")
    row = pipeline.read_sample("a.png", {}, tmp_path)
    assert torch.equal(row["image"][0], pixels)
    other = pipeline.read_sample("b.jpg", {}, tmp_path)
    assert other["image"].shape == row["image"].shape
    state = tensor_of(pipeline.states(collate([{"index": 0, **row}, {"index": 1, **other}])))
    torch.testing.assert_close(
        pipeline.decode(state, pipeline.example())[0, 0] * 255, pixels.float()
    )
    (tmp_path / "c.png").write_text("no picture")
    for sample, words in (("c.png", "no readable picture"), ([1], "path of its file")):
        with pytest.raises(UsageError, match=words):
            pipeline.read_sample(sample, {}, tmp_path)
