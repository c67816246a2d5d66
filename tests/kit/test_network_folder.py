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
from lit_rlft.kit.set_metrics import sums_over_others


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


def test_settings_of_a_damaged_folder_name_the_folder(tmp_path: Path) -> None:
    def read(source: str) -> None:
        raise UsageError("architecture.state must be continuous or mixed, got 'conti*uous'")

    with pytest.raises(UsageError, match=r"pretrained: 'small' is damaged: architecture\.state"):
        load_pretrained("small", tmp_path, read, kind="a model", give="another")
