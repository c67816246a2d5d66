"""The benchmark of GPUs: it resumes, failures are results, its page is what the generator gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench, NotHere, quartiles
from benchmarks.gpu.models import DENOISERS
from benchmarks.gpu.parts import PARTS, fits
from benchmarks.gpu.parts.denoisers import inputs_of
from benchmarks.gpu.table import NOTHING, PAGE, RESULTS, TABLES, page
from lit_rlft.cli.paths import packaged_configs
from lit_rlft.runs.lines import read_lines

CPU = torch.device("cpu")


def run(path: Path, *parts: str) -> list[dict[str, Any]]:
    chosen = ["--parts", *parts] if parts else []
    main(["--tiny", "--device=cpu", "--results", str(path), *chosen])
    return list(read_lines(path))


def test_the_page_is_what_the_generator_gives() -> None:
    assert PAGE.read_text() == page(RESULTS), "run: python -m benchmarks.gpu table"


def test_every_part_has_a_table() -> None:
    assert set(PARTS) == set(TABLES)


def test_fits_are_of_configs_and_say_how_they_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stems = {path.stem for path in packaged_configs()}
    assert {*fits.MODELS, *fits.ALGORITHMS} <= stems

    def main(words: list[str]) -> None:
        if "--config=ddpo" in words:
            raise RuntimeError("two devices")
        if "--config=nft" in words:
            raise SystemExit("lit-rlft: error: not here")

    monkeypatch.setattr(fits, "main", main)
    (row,) = run(tmp_path / "results.jsonl", "fits")[1:-1]
    assert (row["failed"], row["refused"]) == ("ddpo", "nft")
    assert row["said"] == {"ddpo": "RuntimeError: two devices", "nft": "lit-rlft: error: not here"}
    assert set(row["ran"].split(", ")) == {*fits.ALGORITHMS} - {"ddpo", "nft"}


def test_parts_that_are_there_are_skipped_and_interrupted_ones_repeated(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    first = run(path, "limits")
    assert [line["part"] for line in first] == ["about", *["limits"] * 5]
    assert first[0]["torch"] == torch.__version__ and first[0]["tiny"]
    assert all(line["seconds"] > 0 for line in first[1:-1]) and first[-1]["finished"]
    # A process that was killed while it wrote has left half a line.
    path.write_text(path.read_text() + '{"part": "deco')
    second = run(path, "limits", "decode")
    assert second[: len(first)] == first
    assert [line["part"] for line in second[len(first) :]] == ["decode"] * 5
    assert run(path, "limits", "decode") == second


def test_a_file_of_another_device_is_not_mixed_up(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"part": "about", "device": "NVIDIA H100", "tiny": False}) + "\n")
    with pytest.raises(SystemExit, match="NVIDIA H100"):
        run(path, "limits")
    with pytest.raises(SystemExit):
        main(["--device=cpu", "--results", str(path)])


def test_failures_are_rows_and_other_cases_go_on() -> None:
    bench = Bench(CPU, True, seconds=60)

    def fails(error: Exception) -> Any:
        def measure() -> Any:
            raise error

        return measure

    bench.case({"n": 1}, fails(torch.OutOfMemoryError("no memory")))
    bench.case({"n": 2}, fails(NotHere("this version has no such thing")))
    bench.case({"n": 3}, fails(ValueError("a mistake")))
    bench.case({"n": 4}, lambda: {"seconds": 1.0})
    bench.seconds = 0
    bench.case({"n": 5}, lambda: {"seconds": 1.0})
    assert bench.rows == [
        {"n": 1, "out_of_memory": True},
        {"n": 2, "skipped": "this version has no such thing"},
        {"n": 3, "error": "ValueError: a mistake"},
        {"n": 4, "seconds": 1.0},
        {"n": 5, "skipped": "the part's time was over"},
    ]


def test_arms_take_turns_that_begin_with_another_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], list[str]()
    monkeypatch.setattr("benchmarks.gpu.bench.now", lambda: clock[0])

    def arm(name: str, seconds: float) -> Any:
        def call() -> None:
            order.append(name)
            clock[0] += seconds

        return call

    bench = Bench(CPU, True, seconds=60, repeats=3)
    found = bench.turns({"a": arm("a", 1.0), "b": arm("b", 3.0)}, warm=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert found["b"] == {"seconds": 3.0, "low": 3.0, "high": 3.0, "turns": 3}
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == {
        "seconds": 2.5,
        "low": 1.75,
        "high": 3.25,
        "turns": 4,
    }


def rows_of_a_card() -> list[dict[str, Any]]:
    """Results of a made-up card, whose matrix product takes 100 TFLOP/s."""
    time = {"low": 0.9, "high": 1.1, "turns": 7}
    sampling = {"part": "sampling", "batch": 32, "flops": 120e12, **time}
    replay = {"part": "replay", "pairs": 80, **time}
    sdxl = {"part": "sdxl_memory", "peak_gib": 20.0}
    rows = [
        {"part": "about", "device": "A card", "tiny": False, "torch": "2.13"},
        {"part": "limits", "what": "bf16", "flops": 100e12, "seconds": 1.0, **time},
        {"part": "limits", "what": "copy", "bytes": 2e12, "seconds": 1.0, **time},
        {**sampling, "arm": "official", "seconds": 3.0},
        {**sampling, "arm": "ours", "seconds": 2.5},
        {**sampling, "arm": "ours, compiled", "seconds": 2.0},
        {**replay, "arm": "plain loop, 1", "seconds": 8.0, "peak_gib": 6.0},
        {**replay, "arm": "ours, 4", "seconds": 2.0, "peak_gib": 7.0},
        {**replay, "arm": "ours, 4, checkpointed", "seconds": 3.2, "peak_gib": 5.0},
        {"part": "replay", "arm": "ours, 80", "out_of_memory": True},
        {**sdxl, "algorithm": "DDPO"},
        {**sdxl, "algorithm": "DRTune", "peak_gib": 22.5},
        {"part": "denoisers", "family": "flux", "batch": 1, "seconds": 1.0, "flops": 1.0},
    ]
    done = ("limits", "sampling", "replay", "sdxl_memory")
    return [*rows, *({"part": part, "finished": True} for part in done)]


def test_the_table_says_what_the_rows_say(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of_a_card())
    (tmp_path / "a_card.jsonl").write_text(lines)
    (tmp_path / "tiny.jsonl").write_text(json.dumps({"part": "about", "tiny": True}) + "\n")
    text = page(tmp_path)
    assert "## A card" in text and "No results" not in text
    for expected in (
        "| bf16 | 100.0 TFLOP/s |",
        "| copy | 2,000 GB/s |",
        "| 32 x ours | 2,500 (900-1,100) | 12.8 | 48% | 1.20 |  |",
        "| ours, 4 | 2,000 (900-1,100) | 40 | 4.00 | 7 |",
        "| ours, 80 | out of memory |  |  |  |",
        "share of the matrix product | at least 0.5 | 0.60 |",
        "least of all | at least 1 | 1.20 |",
        "at no more memory | at least 2 | 2.50 |",
        "most memory, GiB | at most 24 | 22.50 |",
        f"samples per s of one | at least 1.9 | {NOTHING} |",
        f"| flux, 1 | {NOTHING} |",  # its part was not finished
    ):
        assert expected in text, expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "numbers"),
    [("sdxl", 2_567_463_684), ("sd3", 2_243_171_520), ("flux", 11_901_408_320)],
)
def test_denoisers_have_the_published_sizes_and_take_their_inputs(
    family: str, numbers: int
) -> None:
    """On the meta device: shapes are checked, nothing is computed."""
    bench = Bench(torch.device("meta"), False, seconds=60)
    with torch.device("meta"):
        network = DENOISERS[family]().to(bench.half)
    assert sum(p.numel() for p in network.parameters()) == numbers
    with torch.no_grad():
        (out, *_) = network(**inputs_of(bench, network, family, 2), return_dict=False)
    assert out.shape == {"sdxl": (2, 4, 128, 128), "sd3": (2, 16, 128, 128)}.get(
        family, (2, 4096, 64)
    )


@pytest.mark.slow
def test_all_parts_run_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run(tmp_path / "results.jsonl")
    assert [line["part"] for line in lines if line.get("finished")] == list(PARTS)
    assert not [line for line in lines if "error" in line or "out_of_memory" in line]
    skipped = {line.get("toggle", line["part"]) for line in lines if "skipped" in line}
    assert skipped <= {"scaling"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    arms = [line["arm"] for line in lines if line["part"] == "replay" and "seconds" in line]
    assert "plain loop, 1" in arms and "ours, 4, checkpointed" in arms
