"""Runs compared: the paired test against scipy's, Holm's method, and what is not comparable."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.report.compare import compare, holm, paired_test, to_csv, to_text
from lit_rlft.report.run import distinct_names, read_run
from tests.report.folders import EACH, ROWS, config, write_run


def compared(*folders: Path) -> Any:
    runs = [read_run(folder, tested=True) for folder in folders]
    distinct_names(runs)
    return compare(runs)


def column(folder: Path, name: str) -> np.ndarray:
    with (folder / "test_samples.csv").open() as file:
        return np.array([float(line[name]) for line in csv.DictReader(file)])


def test_the_test_is_the_paired_one_over_rows(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.05)
    (pair,) = compared(a, b).pairs
    rows = [column(x, "tuned/Reward").reshape(ROWS, EACH).mean(axis=1) for x in (a, b)]
    expected = stats.ttest_rel(*rows)
    assert pair.mean == pytest.approx(np.mean(rows[0] - rows[1]), rel=1e-6)
    assert pair.sem == pytest.approx(stats.sem(rows[0] - rows[1]), rel=1e-6)
    assert pair.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (pair.first, pair.second, pair.count) == ("a", "b", ROWS) and pair.adjusted == pair.p


def test_samples_of_one_row_are_no_further_evidence() -> None:
    # Rows differ by nothing but chance, and their samples hardly from each other: counted one by
    # one they would be found different in most experiments instead of in one of twenty.
    draws = np.random.default_rng(0)
    found = {"rows": 0, "samples": 0}
    for _ in range(400):
        rows = draws.normal(size=(10, 1))
        every = rows + 0.1 * draws.normal(size=(10, 8))
        found["rows"] += paired_test(every.mean(axis=1))[3] < 0.05
        found["samples"] += paired_test(every.ravel())[3] < 0.05
    assert 8 <= found["rows"] <= 34  # 20, within three standard errors
    assert found["samples"] > 150


def test_differences_without_spread() -> None:
    assert paired_test(np.zeros(4))[1:] == (0.0, 4, 1.0)
    assert paired_test(np.ones(4)) == (1.0, 0.0, 4, 0.0)
    assert all(math.isnan(x) for x in (paired_test(np.ones(1))[1], paired_test(np.ones(0))[3]))


def test_holm() -> None:
    # Holm (1979): the smallest of four times 4, the next times 3, ..., never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0]) and adjusted[1] == 0.02


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name, gain) for name, gain in (("a", 1.0), ("b", 1.5))]
    files = [f"--csv={tmp_path / 'all.csv'}", f"--markdown={tmp_path / 'all.md'}"]
    main(["compare", *map(str, folders), *files])
    text = capsys.readouterr().out
    metrics = json.loads((folders[0] / "metrics.json").read_text())
    gain = metrics["gain"]["Reward"]
    assert f"{gain['mean']:.3f} ± {gain['sem']:.3f}" in text and "a - b" in text and "400" in text
    lines = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [(line["run"], line["metric"]) for line in lines][:2] == [
        ("a", "Reward"),
        ("a", "other"),
    ]
    assert float(lines[0]["gain"]) == gain["mean"] and float(lines[0]["seconds"]) == 36
    (pair,) = csv.DictReader(io.StringIO((tmp_path / "all_pairs.csv").read_text()))
    assert float(pair["difference"]) == pytest.approx(-0.5, abs=0.2) and float(pair["p"]) < 0.05
    assert "| a - b |" in (tmp_path / "all.md").read_text()
    found = compared(*folders)
    assert to_text(found) in text and to_csv(found)[0] == (tmp_path / "all.csv").read_text()


def changed(**settings: Any) -> dict[str, Any]:
    """Return a config with values at dotted keys."""
    own = config()
    for key, value in settings.items():
        *way, last = key.split("__")
        node = own
        for name in way:
            node = node[name]
        node[last] = value
    return own


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model__init_args__seed": 1}, "other noise: model.seed is 0 in .*/a and 1 in .*/b"),
        ({"model__init_args__sampler": {"num_steps": 9, "eta": 1.0}}, "samplers .*num_steps is 4"),
        ({"data__init_args__num_test": 99}, "conditions are not the same: data.num_test is 5"),
        ({"reward__class_path": "domains.layout.rewards.Overlap"}, "rewards are not the same"),
        ({"pipeline__init_args__pretrained": "own"}, "started from other models: pipeline.pre"),
        (
            {"pipeline__class_path": "domains.molecule.pipeline.MoleculePipeline"},
            "/a is of layout and .*/b of molecule: .*give runs of one domain",
        ),
    ],
)
def test_what_is_not_comparable_is_refused(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=changed(**settings))
    with pytest.raises(UsageError, match=told) as refused:
        compared(a, b)
    assert str(refused.value).count("\n") == 0


def test_settings_of_the_test_count_and_those_that_change_no_sample_do_not(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", settings=changed(data__init_args__eval_batch_size=3))
    (b / "config.yaml").write_text(yaml.safe_dump(changed(model__init_args__seed=7)))
    (b / "config_test.yaml").write_text(yaml.safe_dump(changed(data__init_args__batch_size=3)))
    assert compared(a, b).pairs[0].count == ROWS


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda b: (b / "metrics.json").unlink(),
            "/b has no metrics.json; `lit-rlft test --config",
        ),
        (lambda b: (b / "metrics.json").write_text("{"), "metrics.json is damaged; `lit-rlft test"),
        (lambda b: (b / "test_samples.csv").unlink(), "has no test_samples.csv; `lit-rlft test"),
        (lambda b: (b / "test_samples.csv").write_text("row\n1"), "test_samples.csv is damaged"),
        (
            lambda b: (b / "config.yaml").unlink(),
            "has no config.yaml: it is not the folder of a run",
        ),
        (lambda b: (b / "config.yaml").write_text("- 1"), "config.yaml is damaged"),
        (lambda b: cut(b, ROWS * EACH), "have other rows or conditions"),
        (lambda b: cut(b, None), "100% of the pretrained model's samples have other rewards"),
    ],
)
def test_missing_and_damaged_files(tmp_path: Path, damage: Any, told: str) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    damage(b)
    with pytest.raises(SystemExit, match=f"lit-rlft: error: .*{told}") as ended:
        main(["compare", str(a), str(b)])
    assert str(ended.value).count("\n") == 0


def cut(folder: Path, lines: int | None) -> None:
    """Leave out lines of the table, or give the reference other rewards."""
    path = folder / "test_samples.csv"
    header, *rest = path.read_text().splitlines()
    if lines is None:
        rest = [f"{line.rpartition(',')[0]},{i + 7}" for i, line in enumerate(rest)]
    path.write_text("\n".join([header, *rest[:lines][: None if lines is None else -1]]) + "\n")


def test_impossible_words_are_told_in_a_sentence(tmp_path: Path) -> None:
    a = str(write_run(tmp_path / "a"))
    for words, told in (
        (["compare", a], "compare needs two runs or more"),
        (["compare", a, a], "a run is given twice"),
        (["compare", a, "nowhere"], "nowhere is no folder"),
        (["compare"], "give the folder of a run"),
        (["report", a, "--colour"], "--colour is unknown"),
        (["report", a, f"--output={tmp_path}"], "is a folder; give the name of a file"),
    ):
        with pytest.raises(SystemExit, match=told):
            main(words)
