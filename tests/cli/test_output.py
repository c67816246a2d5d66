"""What a run prints: facts, a line a round in a log, one table, and nothing else."""

import math
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from lit_rlft.callbacks.facts import say
from lit_rlft.callbacks.result_table import result_table
from tests.support import ROOT, arguments, report

TINY = {
    "name": "run",
    "data.init_args.num_train": 16,
    "data.init_args.num_val": 4,
    "data.init_args.num_test": 4,
    "data.init_args.batch_size": 8,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.num_eval_samples": 2,
}
CONFIGS = ("gaussian_mixture", "p_graft")
FAILING = """
import torch
from lit_rlft.core.reward import Reward

class Failing(Reward):
    def forward(self, samples, condition):
        return torch.full((len(condition),), float("nan"))
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(Path.cwd()), str(ROOT)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def logged(stage: str, **settings: object) -> tuple[str, str]:
    """Run a command without a terminal; return what it wrote to its two outputs."""
    words = arguments(stage, CONFIGS, TINY, settings)
    command = [sys.executable, "-m", "lit_rlft.cli", *words]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, result.stderr


def on_a_terminal(*words: str) -> str:
    """Run a command on a terminal of its own; return what it shows."""
    main_end, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, (24, 100))  # bars are as wide as it is
    command = [sys.executable, "-m", "lit_rlft.cli", *words]
    process = subprocess.Popen(
        command, env=environment(), stdin=other_end, stdout=other_end, stderr=other_end
    )
    os.close(other_end)
    shown = b""
    while True:
        try:
            part = os.read(main_end, 4096)
        except OSError:
            break  # the other end is closed
        if not part:
            break
        shown += part
    process.wait(timeout=100)
    os.close(main_end)
    return shown.decode()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_a_log_has_facts_rounds_a_table_and_no_debris() -> None:
    out, err = logged("fit")
    lines = out.splitlines()
    assert re.fullmatch(
        r"PGRAFT on gaussian_mixture for Coordinate; [\d.]+ k parameters trained, [\d.]+ k frozen; "
        r"cpu 32-true; 2 rounds; 64 reward calls to come",
        lines[0],
    )
    rounds = [line for line in lines if line.startswith("round ")]
    for i, line in enumerate(rounds, start=1):
        assert re.fullmatch(rf"round {i} of 2: reward -?[\d.]+, loss -?[\d.]+", line)
    assert len(rounds) == 2
    assert any(re.match(r"validation: Coordinate .*, of the reference ", line) for line in lines)
    assert len(lines) == 6  # and where the run is
    assert err.splitlines() == ["tuned model: runs/run/tuned/mixture.json"]

    out, err = logged("test", ckpt_path="runs/run/checkpoints/last.ckpt")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.count("metrics  runs/run/metrics.json") == 1
    assert lines.count("picture  runs/run/comparison.png") == 1
    header = next(i for i, line in enumerate(lines) if line.startswith("metric "))
    assert lines[header].split() == ["metric", "reference", "tuned", "gain"]
    name, reference, tuned, gain, sign, error = lines[header + 1].split()
    assert (name, sign) == ("Coordinate", "±")
    written = report()
    for text, arm in ((reference, "reference"), (tuned, "tuned"), (gain, "gain")):
        assert float(text) == pytest.approx(written[arm]["Coordinate"]["mean"], abs=0.01)
    assert float(error) == pytest.approx(written["gain"]["Coordinate"]["sem"], abs=0.01)
    assert "DataLoader" not in out and "━" not in out
    assert not re.search(r"[\r\x1b]|it/s|Tip|available|Seed", out + err)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_on_a_terminal_an_error_begins_on_a_line_of_its_own() -> None:
    Path("failing.py").write_text(FAILING)
    shown = on_a_terminal(*arguments("fit", CONFIGS, TINY, {"reward": "failing.Failing"}))
    assert "Epoch 0" in shown  # there were bars
    lines = [re.split(r"\r|\x1b\[\w", line)[-1] for line in re.split(r"\r?\n", shown)]
    assert any(line.startswith("lit-rlft: error: Failing failed for all") for line in lines), shown


def moments(mean: float, sem: float = math.nan) -> dict[str, float]:
    return {"mean": mean, "sem": sem}


def test_a_run_goes_on_when_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        say("stopped by SIGINT")
        say("to go on, ...")


def test_the_table_shows_as_many_decimals_as_the_error_allows() -> None:
    summary = {
        "reference": {"Reward": moments(0.4), "fid": moments(31.25)},
        "tuned": {"Reward": moments(0.654321), "fid": moments(28.5)},
        "gain": {"Reward": moments(0.254321, 0.0123), "fid": moments(-2.75)},
    }
    assert result_table(summary) == (
        "metric  reference  tuned           gain\n"
        "Reward      0.400  0.654  0.254 ± 0.012\n"
        "fid         31.25  28.50          -2.75"
    )


def test_baselines_are_columns_where_they_fit_and_a_table_where_not() -> None:
    arms = ("reference", "best_of_8_samples", "tuned", "gain")
    row = {"Reward": moments(0.5, 0.01)}
    lines = result_table(dict.fromkeys(arms, row)).splitlines()
    assert lines[0].split() == ["metric", *arms]
    row = {"A/metric/of/a/very/long/name/indeed/that/does/not/end": moments(0.5, 0.01)}
    table = result_table(dict.fromkeys((*arms, "best_of_8_noise"), row))
    assert max(map(len, table.splitlines())) <= 80
    main, *others = table.split("\n\n")
    assert main.splitlines()[0].split() == ["metric", "reference", "tuned", "gain"]
    assert "best_of_8_noise" in others[0] and "best_of_8_samples" in others[0]


def test_a_kept_share_has_decimals_of_its_own() -> None:
    summary = {
        "reference": {"fid": moments(3125.0), "kl": moments(0.0)},
        "tuned": {"fid": moments(2850.0), "kl": moments(0.5)},
        "gain": {"fid": moments(-275.0, 20.0), "kl": moments(0.5, 0.1)},
        "best_of_4_samples": {"fid": moments(2500.0)},
        "kept": {"fid": moments(0.44, 0.035)},
    }
    header, fid, kl = result_table(summary).splitlines()
    assert header.split() == ["metric", "reference", "best_of_4_samples", "tuned", "gain", "kept"]
    assert fid.split()[-6:] == ["-275", "±", "20", "0.440", "±", "0.035"]
    assert kl.split() == ["kl", "0.00", "-", "0.50", "0.50", "±", "0.10", "-"]


def test_values_that_are_unknown_or_tiny() -> None:
    summary = {
        "reference": {"a": moments(math.nan), "b": moments(1.5e-7)},
        "tuned": {"a": moments(math.nan), "b": moments(2e-7)},
        "gain": {"b": moments(0.5e-7, 1e-8)},
    }
    _, first, second = result_table(summary).splitlines()
    assert first.split() == ["a", "-", "-", "-"]
    assert second.split() == ["b", "1.50e-07", "2.00e-07", "5.00e-08", "±", "1.00e-08"]
