"""The report's file: what stands in it, what must not, and runs that lack something."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_rlft.core.checks import UsageError
from lit_rlft.report import payload, write_report
from lit_rlft.report.run import read_run
from tests.report.folders import config, write_run

EVIL = '<script>alert("x")</script> </script><img src=//evil.example/x onerror=alert(1)>'


def parts(path: Path) -> tuple[str, Any]:
    """Return a page without what it draws with, and the data that it draws."""
    text = path.read_text()
    packed = dict(re.findall(r'octet-stream" id="(\w+)">([^<]*)<', text))
    data = gzip.decompress(base64.b64decode(packed["data"])).decode()
    for value in packed.values():
        text = text.replace(value, "")
    return text, json.loads(data)


def test_a_report_of_two_runs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", 1.0)
    b = write_run(tmp_path / "b", 2.0, settings=config(num_candidates=16))
    text, data = parts(write_report([a, b], tmp_path / "r.html"))
    order = [text.index(f"<h2>{name}</h2>") for name in ("Settings that differ", "Gains", "Curves")]
    assert order == sorted(order) and "<td>model.num_candidates</td>" in text
    assert "GRAFT on grammar for Reward: 2 runs" in text
    gain = json.loads((b / "metrics.json").read_text())["gain"]["Reward"]
    assert f"{gain['mean']:.3f} ± {gain['sem']:.3f}" in text
    assert "became worse, beyond three standard errors: other" in text
    assert "train: collect" in text and "30 s" in text
    reward = next(chart for chart in data["charts"] if chart["title"] == "reward")
    series = {(one["run"], one["arm"]): one for one in reward["series"]}
    assert set(series) == {(i, arm) for i in (0, 1) for arm in ("training", "tuned", "reference")}
    assert series[0, "tuned"]["y"] == [2, 6] and series[0, "tuned"]["reward_calls"] == [200, 400]
    shown = data["checkpoints"]
    assert shown["places"] == [0, 200, 400] and len(shown["keys"]) == 4 and len(shown["runs"]) == 2
    assert [point["x"] for point in data["hacking"]["other"]["series"]] == [[0, 0.5, 1], [0, 1, 2]]
    assert data["hacking"]["other"]["series"][0]["front"] == [True, True, True]  # it pays for it


def test_each_run_is_told_by_its_own_reward(tmp_path: Path) -> None:
    settings = config()
    settings["reward"]["init_args"]["url"] = "http://localhost/pick"
    a = write_run(tmp_path / "a", 1.0)
    b = write_run(tmp_path / "b", 22.0, settings=settings, reward="Pick")
    text, data = parts(write_report([a, b], tmp_path / "r.html"))
    assert [run["reward"] for run in data["runs"]] == ["Reward", "Pick"] and "reward" not in data
    assert "GRAFT on grammar for Reward, Pick: 2 runs" in text
    assert "Reward rose while" in text and "Pick rose while" in text
    assert "trained on different rewards" in text and text.count('<tr class="main">') == 2
    # Neither curves nor gains of two rewards share a chart.
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert {"Reward", "Pick", "other"} == {*charts} and charts["Pick"]["main"]
    assert {one["run"] for one in charts["Reward"]["series"]} == {0}
    assert {one["run"] for one in charts["Pick"]["series"]} == {1}
    found = data["hacking"]
    assert [*found] == ["other (trained on Reward)", "other (trained on Pick)"]
    told = [(one["name"], one["reward"], one["series"]) for one in found.values()]
    assert [one[:2] for one in told] == [("other", "Reward"), ("other", "Pick")]
    assert [[own["x"] for own in one[2]] for one in told] == [[[0, 0.5, 1]], [[0, 11, 22]]]
    # Of the slider, the means and the values of the tiles are by these names.
    for run, name in zip(data["checkpoints"]["runs"], ("Reward", "Pick"), strict=True):
        assert (
            name in run["reference"][0]["values"]
            and name in run["records"][0]["tuned"][0]["values"]
        )


def gains_table(text: str) -> list[list[str]]:
    """Return the cells of a report's gains, its header first, without marks."""
    part = text.partition("<h2>Gains</h2>")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in part.split("<tr")[1:]]
    return [row for row in rows if row]


def test_one_reference_for_all_runs_or_one_for_each(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 2.0)
    file = b / "metrics.json"
    metrics = json.loads(file.read_text())
    for arm, mean in (("tuned", 3.0), ("reference", 5.0), ("gain", -2.0)):
        metrics[arm]["fid"] = {"mean": mean, "sem": 0.5}
    file.write_text(json.dumps(metrics))
    header, *rows = gains_table(write_report([a, b], tmp_path / "r.html").read_text())
    assert header == ["measurement", "reference", "tuned a", "gain a", "tuned b", "gain b"]
    assert rows[-1][:2] == ["fid", "5.00 ± 0.50"]  # though the first run has none
    for one in metrics["reference"].values():
        one["mean"] += 7.0
    file.write_text(json.dumps(metrics))
    header, *rows = gains_table(write_report([a, b], tmp_path / "r.html").read_text())
    assert header[1:4] == ["reference a", "tuned a", "gain a"] and header[4] == "reference b"
    means = [float(cell.split()[0]) for cell in rows[0][1:]]
    assert means[3] == pytest.approx(means[0] + 7, abs=2e-3)
    assert rows[-1][1:5] == ["-", "-", "-", "12.00 ± 0.50"]


def test_runs_without_reward_calls_are_placed_by_updates(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", calls=0), write_run(tmp_path / "b", checkpoints=(3, 4))
    data = parts(write_report([a], tmp_path / "r.html"))[1]
    assert data["checkpoints"]["places"] == [0, 2, 4]
    assert data["axes"] == ["seconds", "reward_calls"]
    # Beside a run that calls its reward both stand by updates.
    data = parts(write_report([a, b], tmp_path / "r.html"))[1]
    assert data["checkpoints"]["places"] == [0, 2, 3, 4]
    records = [run["records"][-1] for run in data["checkpoints"]["runs"]]
    assert [(one["at"], one["reward_calls"]) for one in records] == [(4, 0), (4, 400)]
    assert data["axes"] == ["seconds", "reward_calls"]
    data = parts(write_report([b], tmp_path / "r.html"))[1]
    assert data["checkpoints"]["places"] == [0, 300, 400]
    assert data["axes"] == ["reward_calls", "seconds"]


def test_no_path_no_secret_and_no_script_of_a_prompt(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", labels=(EVIL,))
    (a / "report" / "warnings.jsonl").write_text(
        json.dumps({"stage": "fit", "message": f"{EVIL} in {tmp_path}/x/y.pt"}) + "\n{broken\n"
    )
    (a / "metrics.json").write_text((a / "metrics.json").read_text().replace("other", EVIL[:8]))
    b = write_run(tmp_path / "b" / "a", settings=config(seed=3))  # a name of its own at depth two
    text, data = parts(write_report([a, b], tmp_path / "r.html"))
    everything = text + json.dumps({**data, "extremes": []})
    for secret in ("geheim", str(tmp_path), str(Path.home()) + "/", "/home/jane"):
        assert secret not in everything
    assert "y.pt" in text and "grammar" in text
    assert text.count("<script") == 3 and "<img" not in text.partition("<script>")[0]
    assert "evil.example" in text and '<script>alert("x")' not in text
    assert data["checkpoints"]["keys"][0]["label"] == EVIL  # the page sets it as text


def test_what_a_run_lacks_is_said_once(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    for path in [a / "metrics.json", *a.glob("report/*.gz"), *a.glob("*tfevents*")]:
        path.unlink()
    text, data = parts(write_report([a], tmp_path / "r.html"))
    assert "no test yet; `lit-rlft test --config" in text and str(tmp_path) not in text
    assert "no curves: the folder has neither TensorBoard&#x27;s event files" in text
    assert "no samples of validations" in text and "The runs have not been tested." in text
    assert not data["charts"] and data["checkpoints"] is None


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tuned",), {"Validity": {"mean": "<b>1</b>"}}),
        (("gain",), None),
        (("cost", "seconds"), "1"),
        (("cost", "phases"), {"train": {"collect": {"seconds": None}}}),
        (("num_samples",), [1]),
        (("checkpoint",), {"num_rounds": {}}),
        (("reward",), 1),
    ],
)
def test_results_of_other_kinds_are_refused(
    keys: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    """As somebody else may have changed them."""
    path = write_run(tmp_path / "a") / "metrics.json"
    metrics = json.loads(path.read_text())
    owner = metrics
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    path.write_text(json.dumps(metrics))
    with pytest.raises(UsageError, match=r"metrics\.json is damaged; `lit-rlft test"):
        read_run(path.parent)


def test_damaged_samples_are_left_out(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    (a / "report/000002.json.gz").write_bytes(b"no gzip")
    text, data = parts(write_report([a], tmp_path / "r.html"))
    assert "000002.json.gz is damaged: its samples are left out" in text
    assert data["checkpoints"]["places"] == [0, 400]


def test_other_noise_is_not_shown_side_by_side(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=config(seed=1))
    text, data = parts(write_report([a, b], tmp_path / "r.html"))
    assert "do not draw from the same conditions and noise" in text
    assert [run["run"] for run in data["checkpoints"]["runs"]] == [0]


def test_other_domains_are_refused(tmp_path: Path) -> None:
    settings = config()
    settings["pipeline"]["class_path"] = "domains.molecule.pipeline.MoleculePipeline"
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=settings)
    with pytest.raises(UsageError, match=r"a is of layout and .*b of molecule"):
        write_report([a, b], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_page_keeps_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_run(tmp_path / "a", checkpoints=range(1, 40))
    whole = write_report([a], tmp_path / "r.html").stat().st_size
    monkeypatch.setattr(payload, "_BUDGET", 20_000)
    _, data = parts(write_report([a], tmp_path / "r.html"))
    assert len(json.dumps(data)) <= 20_000
    records = data["checkpoints"]["runs"][0]["records"]
    assert records[0]["updates"] == 1 and records[-1]["updates"] == 39 and len(records) < 20
    assert (tmp_path / "r.html").stat().st_size < whole < 4_000_000
