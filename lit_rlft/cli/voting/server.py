"""The server of the page: standard library, a thread a request, nothing without its token."""

import base64
import hashlib
import ipaddress
import json
import re
import secrets
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lit_rlft.cli.voting.ballot import Ballot, Refused
from lit_rlft.core.checks import UsageError, from_json

__all__ = ["VoteServer"]

_LARGEST = 4096
"""Bytes of a request's body; a vote takes some 100."""
_TYPES = {
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
_VOTER = re.compile(r"[\w .@-]{1,40}")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class VoteServer(ThreadingHTTPServer):
    """Serves the page of a ballot.

    Args:
        ballot: Hands out questions and takes votes.
        token: First part of every path; it allows to vote.
        host: Name or number of the address to listen at.
        port: Of it; 0 takes any that is free.

    Raises:
        UsageError: The address cannot be had.
    """

    daemon_threads = True
    # On Windows it would let a second server listen at the address of one that runs.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, ballot: Ballot, token: str, host: str, port: int) -> None:
        self.ballot, self.token, self.host = ballot, token, host
        self.page = resources.files(__package__).joinpath("page.html").read_bytes()
        self.policy = _policy(self.page.decode())
        try:
            self.address_family = socket.getaddrinfo(host, port)[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"the page cannot be served at {host}, port {port} ({reason}); choose another "
                "--port, 0 for any, or another --host"
            ) from error

    @property
    def local(self) -> bool:
        """Whether this machine alone can reach it."""
        return _is_loopback(str(self.server_address[0]))

    def urls(self) -> list[str]:
        """Return the addresses of the page, of other machines too where they can reach it."""
        hosts = [self.host]
        if self.host in ("0.0.0.0", "::"):
            hosts = ["localhost", *_own_addresses()]
        port = self.server_address[1]
        shown = [f"[{host}]" if ":" in host else host for host in hosts]
        return [f"http://{host}:{port}/{self.token}/" for host in shown]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a request, unless the browser has only gone away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def knows(self, host: str) -> bool:
        """Return whether a request's Host is one that this server can have.

        Names that somebody else could make point here are refused: his page could then vote.
        """
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name == "localhost" or name == self.host.lower():
            return True
        if not self.local and name.removesuffix(".local") == socket.gethostname().lower():
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lit-rlft", ""
    timeout = 30
    server: VoteServer

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def __getattr__(self, name: str) -> Any:
        """Answer all other methods, for which the base class looks for `do_<method>`."""
        if name.startswith("do_"):
            return lambda: self._answer(name.removeprefix("do_"))
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: paths hold the token."""

    def _answer(self, method: str) -> None:
        try:
            path = self._checked(method)
            if method == "POST":
                self._send_json(self._posted(path))
            else:
                self._got(path)
        except Refused as error:
            self.close_connection = True  # a body may be unread
            self._send_json({"error": str(error)}, error.status)
        except UsageError as error:  # a full disk
            self.close_connection = True
            self._send_json({"error": str(error)}, HTTPStatus.INSUFFICIENT_STORAGE)
        except ValueError:
            self.close_connection = True
            self._send_json({"error": "the request cannot be read"}, HTTPStatus.BAD_REQUEST)
        except OSError:  # the browser has gone away
            self.close_connection = True

    def _checked(self, method: str) -> list[str]:
        """Return the parts of the path after the token."""
        host = self.headers.get("Host", "")
        if not self.server.knows(host):
            raise Refused(403, "this server is not known by that name; use the address it printed")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "another site's page may not vote")
        if self.headers.get("Sec-Fetch-Site", "none") == "cross-site" and method == "POST":
            raise Refused(403, "another site's page may not vote")
        given, *parts = urlsplit(self.path).path.lstrip("/").split("/")
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(403, "unknown token; open the address that `lit-rlft vote` printed")
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(405, "only GET and POST are understood")
        return parts

    def _got(self, path: list[str]) -> None:
        ballot = self.server.ballot
        if path == []:  # the page's own paths are relative to a folder
            self._send(b"", "text/plain", HTTPStatus.FOUND, Location=f"/{self.server.token}/")
        elif path == [""]:
            self._send(self.server.page, "text/html; charset=utf-8", policy=self.server.policy)
        elif path == ["next"]:
            query = parse_qs(urlsplit(self.path).query)
            self._send_json(ballot.next(_voter(query.get("voter", [""])[0])))
        elif len(path) == 3 and path[0] == "drawing":
            if not path[2].isdecimal() or len(path[2]) > 3:
                raise Refused(404, "there is no such picture")
            file = ballot.drawing(path[1], int(path[2]))
            kind = _TYPES[file.suffix.lower()]
            self._send(file.read_bytes(), kind, cached=True)
        elif path in (["vote"], ["undo"]):
            raise Refused(405, "this takes POST")
        else:
            raise Refused(404, "there is nothing at this address")

    def _posted(self, path: list[str]) -> dict[str, Any]:
        if path not in (["vote"], ["undo"]):
            raise Refused(405 if path in ([], [""], ["next"]) else 404, "nothing is posted here")
        body = self._body()
        voter = _voter(body.get("voter"))
        if path == ["undo"]:
            return self.server.ballot.undo(voter)
        question, place = body.get("question"), body.get("choice")
        known = place is None or (isinstance(place, int) and not isinstance(place, bool))
        if not isinstance(question, str) or not known or "choice" not in body:
            raise Refused(400, "a vote has a question, a choice (a number or null) and a voter")
        return self.server.ballot.vote(question, place, voter)

    def _body(self) -> dict[str, Any]:
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind != "application/json":
            raise Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the length of the body must be given")
        if len(length) > 9 or int(length) > _LARGEST:
            raise Refused(413, f"the body is larger than {_LARGEST} bytes")
        try:
            found = from_json(self.rfile.read(int(length)))
        except ValueError:
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(found, dict):
            raise Refused(400, "the body must be an object")
        return found

    def _send_json(self, told: dict[str, Any], status: int = HTTPStatus.OK) -> None:
        self._send(json.dumps(told).encode(), "application/json", status)

    def _send(
        self,
        content: bytes,
        kind: str,
        status: int = HTTPStatus.OK,
        *,
        policy: str = "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        cached: bool = False,
        **headers: str,
    ) -> None:
        self.send_response(status)
        rest = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "private, max-age=600" if cached else "no-store",
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            **({"Allow": "GET, POST"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}),
            **({"Connection": "close"} if self.close_connection else {}),
            **headers,
        }
        for name, value in rest.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _voter(given: Any) -> str:
    if not isinstance(given, str) or not _VOTER.fullmatch(given):
        raise Refused(400, "voter must be a name of 1 to 40 letters, digits, spaces, or . _ @ -")
    return given


def _policy(page: str) -> str:
    """Return a policy that allows the page's own script and style, and requests to this server."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; "
        f"style-src {' '.join(hashes['style'])}; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _own_addresses() -> list[str]:
    """Return numbers by which other machines of the network may reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it chooses the way out
            return [str(probe.getsockname()[0])]
        except OSError:
            return [socket.gethostname()]
