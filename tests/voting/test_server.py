"""The page's server: who may ask, two voters at once, taking back, and kills."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lit_rlft.cli import main
from lit_rlft.cli.voting import ballot as ballots
from lit_rlft.cli.voting.ballot import Ballot, Fixed
from lit_rlft.cli.voting.server import VoteServer
from lit_rlft.cli.voting.sources import samples_ballot
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.preferences import read_preferences
from lit_rlft.runs.lines import read_lines
from lit_rlft.voting.desk import Desk
from lit_rlft.voting.questions import Candidate, Question, QuestionFile, Questions
from tests.voting.client import TOKEN, Voter, fixed, questions, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VoteServer]:
    with serving(fixed(tmp_path_factory.mktemp("votes"), 2)) as running:
        yield running


def own(server: VoteServer) -> Voter:
    return Voter(server.server_address[1])


VOTE = {"voter": "anna", "question": "x", "choice": 0}
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown token": ({"path": "", "token": "wrong"}, 403, "unknown token"),
    "no token": ({"path": "next", "token": "/"}, 403, "unknown token"),
    "token of letters beyond ASCII": ({"path": "", "token": "t%C3%B6"}, 403, "unknown token"),
    "name that points here": ({"path": "", "headers": {"Host": "evil.example"}}, 403, "name"),
    "no host": ({"path": "", "headers": {"Host": ""}}, 403, "name"),
    "number of another machine": ({"path": "", "headers": {"Host": "192.0.2.7"}}, 403, "name"),
    "foreign origin": (
        {"path": "vote", "body": VOTE, "headers": {"Origin": "http://evil.example"}},
        403,
        "another site",
    ),
    "no origin to speak of": (
        {"path": "vote", "body": VOTE, "headers": {"Origin": "null"}},
        403,
        "another site",
    ),
    "page of another site": (
        {"path": "vote", "body": VOTE, "headers": {"Sec-Fetch-Site": "cross-site"}},
        403,
        "another site",
    ),
    "a host that is none": ({"path": "", "headers": {"Host": "["}}, 400, "cannot be read"),
    "an origin that is none": (
        {"path": "", "headers": {"Origin": "http://["}},
        400,
        "cannot be read",
    ),
    "form": (
        {"path": "vote", "body": VOTE, "headers": {"Content-Type": "text/plain"}},
        415,
        "application/json",
    ),
    "oversized body": ({"path": "vote", "body": {"voter": "x" * 5000}}, 413, "larger than 4096"),
    "absurd length": (
        {"path": "vote", "body": b"", "headers": {"Content-Length": "9" * 5000}},
        413,
        "larger than 4096",
    ),
    "negative length": (
        {"path": "vote", "body": b"", "headers": {"Content-Length": "-1"}},
        411,
        "length",
    ),
    "no JSON": ({"path": "vote", "body": b"{"}, 400, "no JSON"),
    "deep JSON": ({"path": "vote", "body": b"[" * 4000}, 400, "no JSON"),
    "a list": ({"path": "vote", "body": b"[1]"}, 400, "an object"),
    "no voter": ({"path": "vote", "body": {"question": "x", "choice": 0}}, 400, "voter"),
    "a voter of markup": ({"path": "undo", "body": {"voter": "<b>"}}, 400, "voter"),
    "no choice": ({"path": "vote", "body": {"voter": "a", "question": "x"}}, 400, "a choice"),
    "a true choice": ({"path": "vote", "body": {**VOTE, "choice": True}}, 400, "a choice"),
    "unknown question": ({"path": "vote", "body": VOTE}, 404, "no such question"),
    "path traversal": ({"path": "drawing/../../etc/passwd"}, 404, "nothing at"),
    "path traversal in code": ({"path": "drawing/%2e%2e%2f%2e%2e/0"}, 404, "no such"),
    "unknown picture": ({"path": "drawing/x/0"}, 404, "no such"),
    "a place of letters": ({"path": "drawing/x/²"}, 404, "no such"),
    "unknown path": ({"path": "votes.jsonl"}, 404, "nothing at this address"),
    "posted to the page": ({"path": "", "body": VOTE}, 405, "nothing is posted here"),
    "a vote by GET": ({"path": "vote"}, 405, "takes POST"),
    "another method": ({"path": "next", "method": "DELETE"}, 405, "GET and POST"),
    "an odd method": ({"path": "next", "method": "BREW"}, 405, "GET and POST"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_have_one_clear_answer(server: VoteServer, case: str) -> None:
    asked, status, words = BAD[case]
    asked = {**asked, "path": asked["path"].replace("²", "%C2%B2")}
    found, told = own(server).send(**asked)
    assert found == status and set(told) == {"error"} and words in told["error"]
    assert str(server.ballot.folder) not in told["error"] and TOKEN not in told["error"]
    assert not server.ballot.votes.path.exists()


def test_the_page_may_do_what_it_does_and_no_more(server: VoteServer) -> None:
    with socket.create_connection(server.server_address[:2]) as raw:
        raw.sendall(f"GET /{TOKEN}/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = raw.recv(4096).decode(errors="replace")
    assert "default-src 'none'" in head and "frame-ancestors 'none'" in head
    assert "script-src 'sha256-" in head and "no-referrer" in head and "nosniff" in head
    page = server.page.decode()
    assert "http://" not in page and "https://" not in page and " src=" not in page


def test_pictures_outside_the_folder_are_not_shown(tmp_path: Path) -> None:
    (secret := tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "run" / "votes"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples/link.png").symlink_to(secret)
    (folder / "samples/config.yaml").write_text("secret")
    names = ("../../secret.png", "samples/link.png", "samples/config.yaml", str(secret), "none.png")
    question = Question({}, "", tuple(Candidate(name, name) for name in names))
    with serving(Ballot(folder, Fixed([question]), folder, live=False)) as server:
        for place in range(len(names)):
            status, told = own(server).send(f"drawing/{question.id}/{place}")
            assert status == 404 and told == {"error": "there is no such picture"}


def test_samples_outside_the_folder_are_no_questions(tmp_path: Path) -> None:
    """As a run that somebody else sent may name them: a vote would copy them into it."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"secret %d" % number)
    names = [f"../../{number}.png" for number in range(2)]
    lines = [json.dumps({"prompt": "a", "seed": 0, "file": name}) for name in names]
    (run / "samples.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(UsageError, match="no condition with two samples"):
        samples_ballot(run, 1)


def test_two_voters_at_once_judge_every_question_once(tmp_path: Path) -> None:
    ballot = fixed(tmp_path, 24)
    with serving(ballot) as server:

        def judge(name: str) -> None:
            voter = Voter(server.server_address[1], name)
            while (told := voter.next())["state"] != "done":
                if told["question"] is not None:
                    assert voter.vote(told["question"]["id"], 0)[0] == 200

        threads = [threading.Thread(target=judge, args=(name,)) for name in ("anna", "bo")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    lines = list(read_lines(tmp_path / "votes.jsonl"))
    assert Counter(line["question"] for line in lines) == dict.fromkeys(ballot.source.known, 1)
    assert {line["voter"] for line in lines} == {"anna", "bo"}
    assert len({line["vote"] for line in lines}) == 24


def test_two_voters_see_different_questions_until_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(fixed(tmp_path, 1)) as server:
        anna, bo = Voter(server.server_address[1]), Voter(server.server_address[1], "bo")
        first = anna.next()["question"]["id"]
        assert bo.next()["state"] == "others"
        assert anna.next()["question"]["id"] == first  # a reload
        monkeypatch.setattr(ballots, "_RESERVED", 0.0)
        assert bo.next()["question"]["id"] == first
        assert bo.vote(first, 1)[0] == 200
        status, told = anna.vote(first, 0)
        assert status == 409 and "the first vote counts" in told["error"]
    (line,) = read_lines(tmp_path / "votes.jsonl")
    assert line["voter"] == "bo"


def test_a_vote_sent_twice_counts_once_and_can_be_taken_back(tmp_path: Path) -> None:
    with serving(fixed(tmp_path, 3)) as server:
        voter = own(server)
        first = voter.next()["question"]["id"]
        assert not voter.next()["undo"]
        told = [voter.vote(first, 0)[1] for _ in range(2)]
        assert told[0] == told[1] and told[0]["answered"] == 1 and told[0]["undo"]
        second = told[0]["question"]["id"]
        voter.vote(second, None)
        assert Voter(server.server_address[1], "bo").undo()[0] == 409  # not somebody else's
        status, told = voter.undo()
        assert status == 200 and told["question"]["id"] == second and told["answered"] == 1
        assert voter.undo()[1]["question"]["id"] == first
        status, told = voter.undo()
        assert status == 409 and "no vote of yours" in told["error"]
        assert (tmp_path / "votes.jsonl").read_text() == ""
        assert voter.vote(first, 1)[1]["answered"] == 1
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 1


def test_what_was_trained_on_is_not_taken_back(tmp_path: Path) -> None:
    asked = questions(tmp_path, 2)
    (run := QuestionFile(tmp_path, 0)).ask(asked)
    with serving(Ballot(tmp_path, Questions(tmp_path), tmp_path, live=True)) as server:
        voter = own(server)
        for _ in range(2):
            told = voter.vote(voter.next()["question"]["id"], 0)[1]
        assert told["state"] == "wait" and told["undo"]
        run.close([question.id for question in asked], 0, "trained")
        assert not voter.next()["undo"]
        status, told = voter.undo()
        assert status == 409 and "has gone on" in told["error"]
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run's folder in which a fit has asked four questions."""
    folder = tmp_path / "run" / "votes"
    QuestionFile(folder, 0).ask(questions(folder, 4))
    return folder.parent


def start(run: Path, port: int = 0) -> tuple[subprocess.Popen[str], Voter]:
    """Start `lit-rlft vote` as a program of its own."""
    words = ["vote", str(run), f"--port={port}"]
    command = [sys.executable, "-m", "lit_rlft", *words]
    # Ctrl-C reaches it also where the tests run in the background, which ignores it.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    _, _, address = process.stdout.readline().partition("http://127.0.0.1:")
    found, token, _ = address.split("/")
    return process, Voter(int(found), token=token)


def test_a_killed_server_loses_no_vote_and_counts_none_twice(run: Path) -> None:
    process, voter = start(run)
    try:
        first = voter.next()["question"]["id"]
        told = voter.vote(first, 0)[1]
        process.send_signal(signal.SIGKILL)
        process.wait()
        with (run / "votes/votes.jsonl").open("a") as file:
            file.write('{"condition": {"prompt": "torn')
        process, again = start(run, voter.port)
        assert (again.port, again.token) == (voter.port, voter.token)  # open pages go on
        assert voter.vote(first, 0)[1]["answered"] == 1  # its answer was lost: the page asks again
        assert voter.vote(told["question"]["id"], 1)[1]["answered"] == 2
        with pytest.raises(SystemExit, match=r"serves .* already"):
            main(["vote", str(run), "--port=0"])
        process.send_signal(signal.SIGINT)
        assert "2 votes in" in process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert len(read_preferences(run / "votes/votes.jsonl")) == 2
    assert (run / "votes/.token").stat().st_mode & 0o077 == 0
    assert voter.token not in (run / "votes/votes.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "there is no run nowhere"),
        (["empty"], "holds nothing to judge"),
        (["empty", "--blind"], "run `lit-rlft test` with --name empty first"),
        (["empty", "--samples"], "holds nothing to judge"),
        (["empty", "more"], "more is one too many"),
        (["empty", "--port=70000"], r"--port must be in \[0, 65535\]"),
        (["empty", "--pairs=0"], "--pairs must be at least 1"),
        (["run", "--port=1"], "cannot be served at 127.0.0.1, port 1"),
        (["run", "--host=no.such.host.invalid"], "cannot be served at no.such"),
    ],
)
def test_bad_words_have_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    if "--port=1" in words and os.geteuid() == 0:
        words, sentence = [*words[:1], "--host=192.0.2.1"], "cannot be served at 192.0.2.1"
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=sentence):
        main(["vote", *words])


def test_a_port_that_is_taken_is_said(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match="choose another --port"):
            VoteServer(fixed(run / "votes", 1), TOKEN, "127.0.0.1", port)


def test_the_server_starts_without_torch(run: Path) -> None:
    code = "import sys, lit_rlft.cli.voting.command; print({'torch', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_waiting_shows_new_questions(tmp_path: Path) -> None:
    asked = questions(tmp_path, 2)
    run = QuestionFile(tmp_path, 0)
    with serving(Ballot(tmp_path, Questions(tmp_path), tmp_path, live=True)) as server:
        voter = own(server)
        assert voter.next()["state"] == "wait"
        run.ask(asked[:1])
        assert voter.next()["question"]["label"] == "prompt 0"
        run.close([asked[0].id], 0, "time")
        time.sleep(0.01)
        assert voter.next()["state"] == "wait"
        assert voter.vote(asked[0].id, 0)[0] == 200  # late, and kept for later
    (line,) = read_lines(tmp_path / "votes.jsonl")
    assert json.dumps(line["condition"]) == '{"prompt": "prompt 0"}'


def test_the_page_knows_when_the_run_has_ended_and_when_it_goes_on(tmp_path: Path) -> None:
    asked = questions(tmp_path, 1)
    desk = Desk(tmp_path, 2)
    with serving(Ballot(tmp_path, Questions(tmp_path), tmp_path, live=True)) as server:
        voter = own(server)
        desk.end()
        assert voter.next()["state"] == "ended"
        time.sleep(0.01)
        (resumed := Desk(tmp_path, 2)).start()
        assert voter.next()["state"] == "wait"
        resumed.ask(asked)
        assert voter.next()["state"] == "ask"
