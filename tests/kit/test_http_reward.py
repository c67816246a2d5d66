"""Rewards from a real server on this machine: its answers, its faults, and its end."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.kit import http_reward
from lit_rlft.kit.http_reward import HTTPReward
from tests.support import scalars

TINY = [
    "--config=gaussian_mixture", "--config=p_graft", "--data.num_train=16", "--data.batch_size=4",
    "--data.num_val=2", "--data.num_test=2", "--model.sampler.num_steps=3", "--name=run",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--reward=HTTPReward",
]  # fmt: skip
Answer = Callable[[list[dict[str, Any]]], Any]
"""What a server says to samples: an object for JSON, or bytes as they are."""


class Server:
    """A scorer on a free port, which remembers what it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.paths: set[str] = set()
        self.answer = answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                samples = json.loads(self.rfile.read(size))["samples"]
                server.asked.append(samples)
                server.paths.add(self.path)
                said = server.answer(samples)
                if isinstance(said, int):
                    self.send_error(said)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    monkeypatch.setattr(http_reward, "_FIRST_WAIT", 0.01)
    servers: list[Server] = []

    def started(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


def first_coordinates(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    points = [json.loads(base64.b64decode(sample["data"])) for sample in samples]
    return {"rewards": [next(iter(point.values()))[0] if isinstance(point, dict) else point[0]
                        for point in points]}  # fmt: skip


def rewards_of(reward: HTTPReward, num_samples: int = 5) -> torch.Tensor:
    pipeline = GaussianMixturePipeline()
    reward.check(pipeline)
    samples = torch.arange(2.0 * num_samples).view(-1, 2)
    return reward(samples, pipeline.example().repeat(num_samples))


def test_samples_go_out_as_files_and_numbers_come_back_in_order(
    serve: Callable[[Answer], Server],
) -> None:
    server = serve(first_coordinates)
    rewards = rewards_of(HTTPReward(server.url, batch_size=2))
    assert rewards.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [len(samples) for samples in server.asked] == [0, 2, 2, 1]
    assert server.asked[1][0]["file"].endswith(".json")


def test_pictures_go_out_as_png_beside_their_prompts(serve: Callable[[Answer], Server]) -> None:
    def red(samples: list[dict[str, Any]]) -> Any:
        pictures = [Image.open(io.BytesIO(base64.b64decode(s["data"]))) for s in samples]
        return {"rewards": [picture.convert("RGB").getpixel((0, 0))[0] for picture in pictures]}

    server, pipeline = serve(red), TextToImagePipeline()
    reward = HTTPReward(server.url)
    reward.check(pipeline)
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[1, 0] = 0.6
    condition = pipeline.encode({"prompt": ["a red ring", "a blue disc"]})
    assert reward(pictures, condition).tolist() == [0, 153]
    sent = [sample["condition"]["prompt"] for sample in server.asked[1]]
    assert sent == ["a red ring", "a blue disc"]
    assert [sample["file"][-4:] for sample in server.asked[1]] == [".png", ".png"]


def test_molecules_go_out_as_sdf_and_layouts_as_json(serve: Callable[[Answer], Server]) -> None:
    def atoms(samples: list[dict[str, Any]]) -> Any:
        texts = [base64.b64decode(sample["data"]).decode() for sample in samples]
        return {"rewards": [int(text.splitlines()[3][:3]) for text in texts]}

    def elements(samples: list[dict[str, Any]]) -> Any:
        return {"rewards": [base64.b64decode(s["data"]).count(b'"label"') for s in samples]}

    for pipeline, answer, end, expected in (
        (MoleculePipeline(), atoms, ".sdf", [5, 6, 9, 5]),
        (LayoutPipeline(), elements, ".json", [6, 5, 2, 3]),
    ):
        server = serve(answer)
        reward = HTTPReward(server.url)
        reward.check(pipeline)
        probes = pipeline.probes()
        assert probes is not None
        assert reward(*probes).tolist() == expected
        assert {Path(sample["file"]).suffix for sample in server.asked[1]} == {end}


FAULTS: dict[str, tuple[Any, str]] = {
    "html": (b"<html><body>Sign in</body></html>", "the answer is no JSON but '<html>"),
    "too few": ({"rewards": [1.0]}, "1 rewards for 5 samples"),
    "no list": ({"scores": []}, 'no list "rewards"'),
    "words": ({"rewards": ["good"] * 5}, "neither a number nor null"),
    "status": (500, "status 500"),
    "deep": (b"[" * 100_000, "the answer is no JSON but"),
    "large": ({"rewards": [10**400] * 5}, "a reward is too large a number"),
    "endless": (b"[" + b"1," * (1 << 23) + b"1]", "more than 16 MB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_samples_and_is_said_once(
    fault: str, serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any process: one alone may have lost the server."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    said, reason = FAULTS[fault]
    server = serve(lambda samples: said if samples else {"rewards": []})
    reward = HTTPReward(f"{server.url}?key=sesame", retries=1)
    with pytest.warns(UserWarning, match=reason) as warned:
        assert rewards_of(reward).isnan().all()
        assert rewards_of(reward).isnan().all()
    assert len(warned) == 1 and "score?key=(hidden) gave" in str(warned[0].message)
    assert len(server.asked) == 2 * (1 + 2)  # a probe, and two requests


@pytest.mark.parametrize("fault", [*FAULTS, "nobody"])
def test_a_server_that_does_not_work_is_named_at_the_start(
    fault: str, serve: Callable[[Answer], Server]
) -> None:
    server = serve(lambda samples: FAULTS.get(fault, (b"", ""))[0])
    if fault == "nobody":
        server.http.socket.close()
    with pytest.raises(UsageError, match=r"gave no rewards at the start \(.*start the server"):
        rewards_of(HTTPReward(server.url, retries=0, timeout=5))


def test_a_null_is_a_sample_that_could_not_be_scored(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda samples: {"rewards": [1, None, 3, 4, 5][: len(samples)]})
    rewards = rewards_of(HTTPReward(server.url))
    assert rewards[1].isnan() and rewards[[0, 2, 3, 4]].tolist() == [1, 3, 4, 5]


def test_a_server_that_hangs_is_given_up(serve: Callable[[Answer], Server]) -> None:
    def hangs(samples: list[dict[str, Any]]) -> Any:
        if len(server.asked) == 2:
            time.sleep(1)
        return {"rewards": [2.0] * len(samples)}

    server = serve(hangs)
    server.http.timeout = 0.1
    with pytest.warns(UserWarning, match="timed out"):
        assert rewards_of(HTTPReward(server.url, timeout=0.2, retries=0)).isnan().all()


def test_a_request_that_failed_is_made_again(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda s: 503 if len(server.asked) in (2, 3) else {"rewards": [1.0] * len(s)})
    assert rewards_of(HTTPReward(server.url, retries=2)).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("$SCORER", "are no URL's"),
        ("score?key=$SCORER", "are no URL's"),
        ("grün", "are no URL's"),
        ("score?key=$SCORER_GONE", r"; export SCORER_GONE=\.\.\.; start the server"),
    ],
)
def test_what_is_wrong_with_a_variable_is_told_without_its_value(
    rest: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER", "open sesame\n")
    with pytest.raises(UsageError, match=reason) as caught:
        rewards_of(HTTPReward(f"http://localhost:1/{rest}", retries=0))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "ftp://host/x", ""])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="url must be such as http://localhost:8000/score"):
        HTTPReward(url)


def test_a_scorer_that_fails_in_mid_run_costs_its_samples_and_not_the_run(
    serve: Callable[[Answer], Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = serve(lambda s: 500 if len(server.asked) in (3, 4) else first_coordinates(s))
    main(
        ["fit", *TINY, f"--reward.url={server.url}", "--reward.retries=0", "--reward.batch_size=8"]
    )
    # After the probe, two requests of 8 samples a round.
    assert scalars("run")["train/failed_rewards"] == [0.5, 0.5, 0, 0]


def test_secrets_of_an_address_stay_in_the_config(
    serve: Callable[[Answer], Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it takes from the environment stay out of that too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCORER", "from-the-environment")
    server = serve(first_coordinates)
    main(["fit", *TINY, f"--reward.url={server.url}?api_key=sesame&more=$SCORER"])
    assert server.paths == {"/score?api_key=sesame&more=from-the-environment"}
    written = {path: path.read_bytes() for path in Path("runs").rglob("*.*") if path.is_file()}
    having = {
        word: {p.name for p, content in written.items() if word in content}
        for word in (b"sesame", b"from-the-environment", b"/score?")
    }
    assert having[b"sesame"] == {"config.yaml"} and not having[b"from-the-environment"]
    assert {"README.md", "config.yaml", "last.ckpt"} < having[b"/score?"]


def test_a_scorer_that_is_gone_ends_the_run_where_it_can_go_on(
    serve: Callable[[Answer], Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = serve(lambda s: 500 if len(server.asked) > 3 else first_coordinates(s))
    words = [*TINY, f"--reward.url={server.url}", "--reward.retries=0"]
    with pytest.raises(SystemExit, match="HTTPReward failed for all 16 samples"):
        main(["fit", *words])
    server.answer = first_coordinates
    main(["fit", *words, "--ckpt_path=runs/run/checkpoints/last.ckpt"])
    assert len(scalars("run")["train/failed_rewards"]) == 4


SCORER = """
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

port, calls, dies_at = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
        with calls.open("a") as file:
            file.write("x")
        if str(len(calls.read_text())) in dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": list(range(len(samples)))}).encode())

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.slow  # waits for a scorer to come back
def test_a_scorer_that_is_killed_in_mid_run_costs_its_samples_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(http_reward, "_FIRST_WAIT", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    over, started = threading.Event(), []

    def keep_up() -> None:
        while not over.is_set():
            words = [sys.executable, "-c", SCORER, str(port), "calls", "5,6"]
            with subprocess.Popen(words) as scorer:
                started.append(scorer)
                scorer.wait()

    keeper = threading.Thread(target=keep_up)
    keeper.start()
    try:
        while not _listens(port):
            time.sleep(0.05)
        main(
            ["fit", *TINY, f"--reward.url=http://127.0.0.1:{port}/score", "--reward.retries=1",
             "--reward.batch_size=8", "--model.reward_workers.kind=process"]
        )  # fmt: skip
    finally:
        over.set()
        started[-1].kill()
        keeper.join()
    # After the probe two requests of 8 samples a round: the fourth one kills its scorer twice.
    assert scalars("run")["train/failed_rewards"] == [0, 0.5, 0, 0]
    assert len(started) == 3


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
