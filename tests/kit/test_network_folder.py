"""Pretrained networks: what a name finds, and the sentence where it finds nothing."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.network_folder import check_one_given, load_pretrained
from lit_rlft.kit.set_metrics import pseudo_values, sums_over_others


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    folder = tmp_path / "assets"
    (folder / "small").mkdir(parents=True)
    return folder


def load(pretrained: str, embedded: Path) -> str:
    def read(source: str) -> str:
        if source == "nobody/nothing":
            raise OSError("no such repository\nand more")
        return source

    return load_pretrained(pretrained, embedded, read, kind="a toy model", give="'small'")


def test_paths_come_before_names_and_names_before_hub_ids(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load("small", embedded) == str(embedded / "small")
    assert load(str(tmp_path), embedded) == str(tmp_path)
    assert load("someone/model", embedded) == "someone/model"
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("small", embedded) == "small"


def test_one_sentence_where_nothing_can_be_read(embedded: Path) -> None:
    with pytest.raises(UsageError) as error:
        load("nobody/nothing", embedded)
    assert str(error.value) == (
        "pipeline.init_args.pretrained: 'nobody/nothing' could not be loaded as a toy model; give "
        "'small' (no such repository)"
    )
    check_one_given(None, object())
    check_one_given("small", None)
    with pytest.raises(UsageError, match="pretrained and architecture exclude each other"):
        check_one_given("small", object())


def test_long_reasons_are_cut(embedded: Path, tmp_path: Path) -> None:
    def read(source: str) -> str:
        raise OSError("what the reader met " * 30)

    with pytest.raises(UsageError) as error:
        load_pretrained("own", embedded, read, kind="a toy model", give="'small'")
    assert re.search(r"give 'small' \(what the reader .{150,190}he reader met\)$", str(error.value))
    header = b'{"a": {"dtype": "F16", "shape": [1\x01'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match=r"give 'small' \([^:]*: invalid JSON in header\)$"):
        load_pretrained(
            str(file), embedded, lambda source: str(load_file(source)), kind="a model",
            give="'small'",
        )  # fmt: skip


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    class Network(Frozen):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    network = frozen(Network())
    assert not network.train().training and not network.layers[1].training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_sums_over_others_leave_out_the_sample_itself_and_other_conditions() -> None:
    distances = torch.tensor([[9.0, 1, 2, 4], [1, 9, 3, 5], [2, 3, 9, 6], [4, 5, 6, 9]])
    totals, counts = sums_over_others(distances, torch.tensor([0, 0, 0, 1]))
    assert totals.tolist() == [3, 4, 5, 0] and counts.tolist() == [2, 2, 2, 0]


def test_pseudo_values_are_by_leaving_out() -> None:
    draws = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, dtype=torch.float64, generator=draws)
    distances = torch.cdist(points, points)
    rows = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0, 3])
    totals, counts = sums_over_others(distances, rows)
    found = pseudo_values(totals / counts, rows)
    assert found[[4, 8]].isnan().all()  # alone
    assert found[1] == found[6] == distances[1, 6]  # two have one distance
    members = [0, 2, 3, 5, 7]
    whole = torch.pdist(points[members]).mean()
    for place in members:
        others = [one for one in members if one != place]
        expected = 5 * whole - 4 * torch.pdist(points[others]).mean()
        torch.testing.assert_close(found[place], expected)
    torch.testing.assert_close(found[members].mean(), whole)
    # What is not known takes no part.
    known = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    values = pseudo_values(known, torch.zeros(4).long())
    assert values.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(values[[0, 1, 3]], torch.tensor([-5.0, -1.0, 15.0]))


def test_settings_of_a_damaged_folder_name_the_folder(tmp_path: Path) -> None:
    def read(source: str) -> None:
        raise UsageError("architecture.state must be continuous or mixed, got 'conti*uous'")

    with pytest.raises(UsageError, match=r"pretrained: 'small' is damaged: architecture\.state"):
        load_pretrained("small", tmp_path, read, kind="a model", give="another")
