"""The sweep of benchmarks/cut_regimes.py on its two domains, and its tables."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def regimes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cut_regimes")


@pytest.fixture
def small(regimes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    sizes = {"STEPS": 4, "CANDIDATES": 2, "HELD_OUT": 4, "TEST": 70, "BATCH": 4}
    for name, value in {**sizes, "ACCEPTED": (4,), "CUTS": (0.0, 0.5)}.items():
        monkeypatch.setattr(regimes, name, value)
    return regimes


@pytest.mark.parametrize("domain", ["layout", "digits"])
def test_a_small_sweep_has_all_that_the_tables_show(
    small: ModuleType, domain: str, tmp_path: Path
) -> None:
    out = tmp_path / "cells.jsonl"
    wanted = list(small.cells(domain, [0], [4], ["LoRA 4"], [2], [0.0, 0.5]))
    small.sweep(out, iter(wanted))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [small.cell_of(line) for line in lines] == wanted and len(wanted) == 4
    for line in lines:
        *known, recall = small.columns_of(line)
        assert all(map(math.isfinite, known)) and math.isnan(recall) == (domain == "layout")
        assert ("0.1" in line["held_out_loss"]) == (line["cut"] == 0.0)
    small.sweep(out, iter(wanted))
    assert len(out.read_text().splitlines()) == 4


def test_each_domain_has_samples_of_its_own(
    regimes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    met: list[tuple[str, tuple[str, int]]] = []

    def run(cell: Any, drawn: tuple[str, int]) -> dict[str, Any]:
        met.append((cell.domain, drawn))
        return {**vars(cell), "gain": {cell.objective: 0.0}, "fid": 0.0}

    monkeypatch.setattr(regimes, "Drawn", lambda *own: own)
    monkeypatch.setattr(regimes, "run", run)
    wanted = [
        regimes.Cell(seed, next(iter(regimes.DOMAINS[domain].judges)), 64, "full", 0.0, domain)
        for seed, domain in ((0, "layout"), (0, "digits"), (1, "digits"))
    ]
    regimes.sweep(tmp_path / "cells.jsonl", iter(wanted))
    assert met == [(cell.domain, (cell.domain, cell.seed)) for cell in wanted]


def test_cuts_are_compared_seed_by_seed(
    regimes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(seed: int, cut: float, gain: float, fid: float, judge: float) -> dict[str, Any]:
        distances = {"recall_digits_features": 0.5 + cut * (1 + seed)}
        cell = {"seed": seed, "objective": "three", "accepted": 64, "trained": "full", "cut": cut}
        gains = {"three": gain, "three, other network": judge}
        measured = {"distances": distances, "distances_reference": {"recall_digits_features": 0.9}}
        own = {"domain": "digits", "gain": gains, "fid": fid, "fid_reference": 2.0}
        return {**cell, **own, **measured}

    # Of seed 2 there is one cut alone.
    cells = [line(0, 0.0, 1.0, 5.0, 0.5), line(0, 0.25, 0.5, 3.0, 0.6), line(2, 0.25, 9, 9, 9)]
    cells += [line(1, 0.0, 2.0, 7.0, 0.1), line(1, 0.25, 1.1, 4.0, 0.6)]
    (out := tmp_path / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    regimes.versus(out)
    *head, own = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (*head, own)} == {12}
    start = "| digits | three | 64 | full | 200 | 0.25 |"
    assert own == f"{start} -0.700 ± 0.200 | -2.500 ± 0.500 | +0.300 ± 0.200 | +0.375 ± 0.125 | 2 |"


def test_the_page_shows_what_was_measured(
    regimes: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/benchmarks/cut_regimes.md").read_text(encoding="utf-8").splitlines()
    regimes.versus(ROOT / "benchmarks/sweeps/cut_regimes.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 22 and set(lines) <= set(page)
