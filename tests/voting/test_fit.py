"""Fits whose reward is a person: votes come over HTTP while they run."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.cli import main
from lit_rlft.cli.voting.ballot import shown_order
from lit_rlft.cli.voting.sources import blind_ballot, fit_ballot, samples_ballot
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import WeightedSum
from lit_rlft.kit.offloaded import Offloaded
from lit_rlft.kit.preferences import read_preferences
from lit_rlft.runs.lines import read_lines
from lit_rlft.voting import desk
from lit_rlft.voting.human_preference import HumanPreference
from lit_rlft.voting.questions import Candidate, QuestionFile, Questions
from tests.support import TWO_FORKS, arguments, scalars
from tests.voting.client import Voter, serving

REWARD = "lit_rlft.voting.human_preference.HumanPreference"
TINY = {
    "name": "run",
    "reward": REWARD,
    "data.init_args.num_train": 8,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 2,
    "data.init_args.batch_size": 4,
    "model.init_args.sampler.num_steps": 2,
    "model.init_args.sampling_batch_size": 3,  # groups are drawn in parts
    "model.init_args.num_eval_samples": 2,
    "reward.init_args.undo_seconds": 0.0,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
}
Prefers = Callable[[Path, list[Candidate]], int | None]


def command(stage: str, algorithm: str, **settings: Any) -> None:
    more = {key.replace("__", "."): value for key, value in settings.items()}
    main(arguments(stage, ("gaussian_mixture", algorithm), TINY, more))


def rightmost(folder: Path, shown: list[Candidate]) -> int:
    points = [json.loads((folder / one.sample).read_text()) for one in shown]
    xs = [torch.tensor(point["x"] if isinstance(point, dict) else point)[0] for point in points]
    return int(torch.stack(xs).argmax())


@contextmanager
def voting(run: Path, prefers: Prefers, most: int = 10_000) -> Iterator[list[str]]:
    """Let somebody vote on what a fit asks, as soon as its folder is there; yield the questions."""
    asked: list[str] = []
    over = threading.Event()

    def judge() -> None:
        while not (run / "votes").is_dir():
            if over.wait(0.01):
                return
        ballot = fit_ballot(run)
        with serving(ballot) as server:
            voter = Voter(server.server_address[1])
            while not over.is_set() and len(asked) < most:
                question = voter.next()["question"]
                if question is None:
                    over.wait(0.01)
                    continue
                shown = shown_order(ballot.source.known[question["id"]])
                place = prefers(ballot.folder, shown)
                if voter.vote(question["id"], place)[0] == 200:
                    asked.append(question["id"])

    thread = threading.Thread(target=judge)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join(timeout=30)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(desk, "_PAUSE", 0.01)
    return tmp_path


def chosen_and_rejected(run: Path) -> tuple[float, float]:
    """Return the mean first coordinates of what was preferred to what."""
    points = [
        [rightmost_value(run / "votes", name) for name in (pair.chosen, pair.rejected)]
        for pair in read_preferences(run / "votes/votes.jsonl")
    ]
    chosen, rejected = torch.tensor(points).mean(dim=0).tolist()
    return chosen, rejected


def rightmost_value(folder: Path, name: str) -> float:
    point = json.loads((folder / name).read_text())
    return float((point["x"] if isinstance(point, dict) else point)[0])


@pytest.mark.parametrize(
    ("algorithm", "settings", "questions"),
    [
        ("dpo", {"model__init_args__num_candidates": 2}, 8),
        pytest.param(
            "grpo",
            {"model__init_args__num_candidates": 4, "reward__init_args__pairs": 4},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "p_graft",
            {
                "model__init_args__num_candidates": 4,
                "model__init_args__selection": "Threshold",
                "reward__init_args__show": "groups",
                "reward__init_args__values": "wins",
            },
            8,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fit_trains_on_votes_as_they_come(
    algorithm: str, settings: dict[str, Any], questions: int
) -> None:
    with voting(run := Path("runs/run"), rightmost) as asked:
        command("fit", algorithm, **settings)
    assert len(asked) == len(set(asked)) == questions
    (left := Questions(run / "votes")).refresh()
    assert left.ended and not left.open
    chosen, rejected = chosen_and_rejected(run)
    assert chosen > rejected
    logged = scalars()
    assert logged["train/failed_rewards"] == [0, 0]
    if algorithm == "p_graft":
        assert logged["train/acceptance_rate"] == pytest.approx([1 / 4, 1 / 4])
        assert logged["train/accepted_reward"] == [1, 1]
    if algorithm == "dpo":
        assert logged["train/pairs_per_condition"] == [1, 1]


@pytest.mark.slow  # four commands
def test_nobody_is_asked_in_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    """Fit with validation, test and predict: the eight questions are those of the rounds."""
    settings = {"model__init_args__num_candidates": 2}
    with voting(run := Path("runs/run"), rightmost) as asked:
        command("fit", "dpo", **settings)
        assert "lit-rlft vote runs/run" in capsys.readouterr().out
        for stage in ("validate", "test", "predict"):
            command(stage, "dpo", **settings)
    assert len(asked) == 8
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["rewards"]["HumanPreference"] for sample in samples} == {None}
    report = json.loads((run / "metrics.json").read_text())
    assert report["tuned"]["HumanPreference"]["mean"] is None
    assert report["tuned"]["kl"]["mean"] is not None
    blind = blind_ballot(run)
    with serving(blind) as server:
        voter = Voter(server.server_address[1])
        for _ in blind.source.known:
            told = voter.vote(voter.next()["question"]["id"], 0)[1]
    assert told["state"] == "done" and f"of {len(blind.source.known)} comparisons" in told["result"]
    with pytest.raises(SystemExit, match="best_of must be 0 with HumanPreference"):
        command("test", "dpo", **settings, model__init_args__best_of=2)


@pytest.mark.slow  # a fit of each algorithm
def test_without_votes_the_run_goes_on_and_learns_nothing() -> None:
    waits = {"reward__init_args__timeout": 0.05}
    for algorithm in ("dpo", "grpo", "p_graft", "nft"):
        command("fit", algorithm, **waits, name=algorithm)
        last = torch.load(f"runs/{algorithm}/checkpoints/last.ckpt", weights_only=True)
        assert last["lit_rlft"]["num_rounds"] == 2
        assert scalars(algorithm)["train/failed_rewards"] == [1, 1]
    moved = [value for name, value in last["state_dict"].items() if "lora_B" in name]
    assert not any(bool(value.any()) for value in moved)


@pytest.mark.slow  # waits for the time-out
def test_groups_without_votes_are_left_out_and_the_others_train() -> None:
    settings = {"model__init_args__num_candidates": 2, "reward__init_args__timeout": 1.0}
    with voting(Path("runs/run"), rightmost, most=3) as asked:
        command("fit", "dpo", **settings, data__init_args__num_train=4)
    assert len(asked) == 3
    logged = scalars()
    assert logged["train/failed_rewards"] == [0.25]
    assert logged["train/pairs_per_condition"] == [0.75]


class Killed(Exception):
    """Stands for what ends a run at once."""


@pytest.mark.slow  # three fits
def test_a_run_that_was_killed_finds_its_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third round's votes are there, and it fails: the resumed run asks for none of them."""
    settings: dict[str, Any] = {"model__init_args__num_candidates": 2}
    settings["data__init_args__num_train"] = 16
    taken = desk.Desk._taken

    def fail(own: desk.Desk, names: list[str], number: int, why: str) -> Any:
        if number == 2:
            raise Killed
        return taken(own, names, number, why)

    with voting(run := Path("runs/run"), rightmost) as asked:
        with monkeypatch.context() as patched, pytest.raises(SystemExit, match="Killed"):
            patched.setattr(desk.Desk, "_taken", fail)
            command("fit", "dpo", **settings)
        before = (run / "votes/votes.jsonl").read_bytes()
        assert len(asked) == 12
        command("fit", "dpo", **settings, ckpt_path=str(run / "checkpoints/last.ckpt"))
    assert len(asked) == len(set(asked)) == 16
    assert (run / "votes/votes.jsonl").read_bytes().startswith(before)
    with voting(Path("runs/whole"), rightmost):
        command("fit", "dpo", **settings, name="whole")
    same = [
        torch.load(f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("run", "whole")
    ]
    for name, value in same[0]["state_dict"].items():
        assert torch.equal(value, same[1]["state_dict"][name]), name


@pytest.mark.slow  # starts processes
def test_two_processes_ask_each_its_own() -> None:
    with voting(run := Path("runs/run"), rightmost) as asked:
        main(
            arguments(
                "fit",
                ("gaussian_mixture", "dpo"),
                TINY,
                TWO_FORKS,
                {"model.init_args.num_candidates": 2, "data.init_args.batch_size": 2},
            )
        )
    assert len(asked) == len(set(asked)) == 8
    owners = [len({line["question"] for line in _lines(run, rank)}) for rank in (0, 1)]
    assert owners == [4, 4]


def _lines(run: Path, rank: int) -> list[Mapping[str, Any]]:
    path = run / "votes" / f"questions_{rank}.jsonl"
    return [line for line in read_lines(path) if "question" in line]


def test_a_signal_ends_the_wait_and_the_other_process_hears_of_it(tmp_path: Path) -> None:
    stop = threading.Event()
    first = desk.Desk(tmp_path, 2, rank=0, world_size=2, stopping=stop.is_set)
    second = desk.Desk(tmp_path, 2, rank=1, world_size=2)
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda own=own: found.append(own.wait([], 3, timeout=None, undo_seconds=0.0))
        )
        for own in (first, second)
    ]
    QuestionFile(tmp_path, 1).ask(_questions(tmp_path, 3))
    for thread in threads:
        thread.start()
    threads[0].join(timeout=0.2)
    assert threads[0].is_alive()  # it waits for the other's questions
    stop.set()
    for thread in threads:
        thread.join(timeout=10)
    assert found == [{}, {}]


def _questions(folder: Path, number: int) -> Any:
    from tests.voting.client import questions

    return [type(q)(q.condition, q.label, q.candidates, number) for q in questions(folder, 1)]


def test_votes_on_predicted_samples_are_trained_on_later() -> None:
    """Collect now: the samples of predict, which a later predict may overwrite."""
    command("predict", "dpo", model__init_args__num_eval_samples=4)
    run = Path("runs/run")
    for file in (run / "samples").glob("*.json"):  # the domain writes no pictures
        file.with_suffix(".svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with serving(samples_ballot(run, 3)) as server:
        voter = Voter(server.server_address[1])
        for number in range(3):
            told = voter.next()["question"]
            status, picture = voter.send(f"drawing/{told['id']}/0")
            assert status == 200 and picture.startswith(b"<svg")
            assert voter.vote(told["id"], 0)[1]["answered"] == number + 1
        assert voter.next()["state"] == "done"
    pairs = read_preferences(run / "votes/votes.jsonl")
    assert len(pairs) == 3 and all(pair.chosen.startswith("samples/") for pair in pairs)


def drawn(pipeline: Pipeline, num: int) -> tuple[Any, Condition]:
    probes = pipeline.probes()
    assert probes is not None
    samples, condition = probes
    rows = torch.arange(num)
    return pipeline.index_samples(samples, rows), condition.index(rows)


@pytest.mark.parametrize("kind", [LayoutPipeline, MoleculePipeline])
def test_other_domains_are_drawn(kind: Callable[[], Pipeline], tmp_path: Path) -> None:
    pipeline = kind()
    samples, condition = drawn(pipeline, 2)
    condition = Condition(condition.entries, {}, torch.zeros(2, dtype=torch.int64))
    reward = HumanPreference(timeout=0.01)
    reward.check(pipeline)
    reward.open(tmp_path, 2)
    reward.offer(samples, condition)
    assert reward(samples, condition).isnan().all()
    (known := Questions(tmp_path)).refresh()
    (question,) = known.known.values()
    for one in question.candidates:
        assert (tmp_path / one.sample).suffix in (".json", ".sdf")
        assert (tmp_path / one.drawing).stat().st_size > 100
        assert (tmp_path / one.drawing).suffix == (".svg" if kind is LayoutPipeline else ".png")


def test_equal_candidates_are_not_compared(tmp_path: Path) -> None:
    pipeline = GaussianMixturePipeline()
    points = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.1, 0.2], [0.1, 0.2], [0.7, 0.7], [0.1, 0.2]])
    condition = Condition([{}], {}, torch.zeros(6, dtype=torch.int64))
    reward = HumanPreference(values="wins", undo_seconds=0.0)
    reward.check(pipeline)
    reward.open(tmp_path, 2)
    with voting(tmp_path.parent / tmp_path.name, rightmost):
        pass
    reward.offer(points, condition)
    (known := Questions(tmp_path)).refresh()
    (question,) = known.known.values()
    from lit_rlft.voting.votes import Votes

    Votes(tmp_path).add(question, question.candidates[0].sample, "anna")
    values = reward(points, condition)
    assert values[:4].isnan().all() and values[4:].tolist() == [1, 0]


def test_in_a_sum_the_person_is_one_part() -> None:
    part = HumanPreference()
    whole = WeightedSum({"person": part, "other": HumanPreference()}, held_out=["other"])
    assert whole.asks and not WeightedSum({"a": part, "b": _Constant()}, held_out=["a"]).asks


class _Constant(HumanPreference):
    asks = False


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"show": "three"}, "show is 'three'; use 'pairs' or 'groups'"),
        ({"values": "rank"}, "values is 'rank'; use 'scores' or 'wins'"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"prior": 0.0}, "prior must be positive"),
        ({"timeout": -1.0}, "timeout must be positive"),
        ({"undo_seconds": -1.0}, "undo_seconds must be at least 0"),
    ],
)
def test_impossible_settings_have_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadArgument, match=sentence):
        HumanPreference(**settings)


def test_what_cannot_ask_says_so(tmp_path: Path) -> None:
    reward = HumanPreference(show="groups")
    with pytest.raises(UsageError, match="was not told where to ask"):
        reward.offer(torch.zeros(2, 2), Condition([{}], {}, torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(BadArgument, match="9 candidates at most, got 10"):
        reward.open(tmp_path, 10)
    with pytest.raises(BadArgument, match="2 candidates a condition or more"):
        reward.open(tmp_path, 1)
    with pytest.raises(BadArgument, match="a person takes no memory"):
        Offloaded(reward)


def test_an_algorithm_without_groups_is_refused() -> None:
    with pytest.raises(SystemExit, match="HumanPreference"):
        command("fit", "drtune")
    assert not list(Path("runs").glob("*/votes"))
