"""What tests of voting share: a server on a free port, and voters that speak HTTP with it."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from lit_rlft.cli.voting.ballot import Ballot, Fixed
from lit_rlft.cli.voting.server import VoteServer
from lit_rlft.voting.questions import Candidate, Question

TOKEN = "t0ken"
Choose = Callable[[dict[str, Any]], int | None]
"""From a question as the page has it to the place of the better sample."""


class Voter:
    """Somebody with a browser, without the browser."""

    def __init__(self, port: int, name: str = "anna", token: str = TOKEN) -> None:
        self.port, self.name, self.token = port, name, token

    def send(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> tuple[int, Any]:
        """Return status and answer, an object where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        text = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        own = {"Content-Type": "application/json"} if text is not None else {}
        verb = method or ("GET" if body is None else "POST")
        given = token or self.token
        connection.request(verb, f"/{given}/{path}", text, {**own, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kind = answer.headers["Content-Type"]
        return answer.status, json.loads(content) if kind == "application/json" else content

    def next(self) -> dict[str, Any]:
        status, told = self.send(f"next?voter={self.name}")
        assert status == 200, told
        return dict(told)

    def vote(self, question: str, choice: int | None) -> tuple[int, Any]:
        return self.send("vote", {"voter": self.name, "question": question, "choice": choice})

    def undo(self) -> tuple[int, Any]:
        return self.send("undo", {"voter": self.name})


class Ending(VoteServer):
    """A server that ends as a killed program does: with the connections that are open."""

    def get_request(self) -> Any:
        connection, address = super().get_request()
        vars(self).setdefault("held", []).append(connection.dup())
        return connection, address

    def end_connections(self) -> None:
        for connection in vars(self).get("held", []):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@contextmanager
def serving(ballot: Ballot, port: int = 0) -> Iterator[VoteServer]:
    """Serve a ballot in this process."""
    with Ending(ballot, TOKEN, "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.end_connections()


def questions(folder: Path, number: int, size: int = 2) -> list[Question]:
    """Return questions about small pictures, all different, which are written."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(number):
        candidates = []
        for j in range(size):
            name = f"samples/{i}-{j}.png"
            Image.new("RGB", (8, 8), (40 * i % 256, 80 * j, 128)).save(folder / name)
            candidates.append(Candidate(name, name))
        found.append(Question({"prompt": f"prompt {i}"}, f"prompt {i}", tuple(candidates)))
    return found


def fixed(folder: Path, number: int, size: int = 2) -> Ballot:
    """Return a ballot of such questions."""
    return Ballot(folder, Fixed(questions(folder, number, size)), folder, live=False)
