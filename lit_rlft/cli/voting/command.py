"""The words of `lit-rlft vote`."""

import os
import secrets
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from lit_rlft.cli.voting.ballot import Ballot
from lit_rlft.cli.voting.server import VoteServer
from lit_rlft.cli.voting.sources import blind_ballot, fit_ballot, samples_ballot
from lit_rlft.core.checks import UsageError
from lit_rlft.runs.lines import locked
from lit_rlft.voting.places import FOLDER

__all__ = ["run"]

_PORT = 8765
_TOKEN, _SERVER = ".token", ".server"
"""Files in the folder of the votes: the token, and the lock of the one server there."""


def run(words: Sequence[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UsageError: There is nothing to judge, or the page cannot be served.
    """
    asked = _parsed(words)
    folder = Path(asked.run)
    ballot = _ballot(folder, asked)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(ballot.folder / _SERVER, wait=False))
        except BlockingIOError:
            raise UsageError(
                f"another `lit-rlft vote` serves {ballot.folder} already; use its page, or end it"
            ) from None
        server = stack.enter_context(
            VoteServer(ballot, _token(ballot.folder), asked.host, asked.port)
        )
        for url in server.urls():
            print(f"vote: {url}")
        if not server.local:
            print("everybody in this network with the address can vote; it is not encrypted")
        print("keys: 1, 2, ... choose, space for no difference, u takes back; Ctrl-C ends it")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
        print(_summary(ballot))


def _parsed(words: Sequence[str]) -> Namespace:
    about = """Show samples on a local page, on which a person says which is the better one. Without
    options: the candidates of a fit whose reward is HumanPreference, else the samples of predict.
    Votes go to RUN/votes/votes.jsonl, which is a file of preferences."""
    parser = ArgumentParser("lit-rlft vote", description=about, exit_on_error=False)
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as runs/demo")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--samples", action="store_true", help="judge the samples of predict")
    kind.add_argument(
        "--blind", action="store_true", help="judge tuned against reference, as test drew them"
    )
    parser.add_argument("--pairs", type=int, help="with samples: comparisons of a condition")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for phones in the network"
    )
    parser.add_argument("--port", type=int, default=_PORT, help=f"{_PORT} unless given; 0 for any")
    try:
        asked, odd = parser.parse_known_args(words)
    except ArgumentError as error:
        raise UsageError(f"lit-rlft vote: {error}; `lit-rlft vote --help` shows how") from error
    if odd:
        raise UsageError(f"lit-rlft vote: {' '.join(odd)} is one too many; give one run's folder")
    if asked.pairs is not None and asked.pairs < 1:
        raise UsageError(f"lit-rlft vote: --pairs must be at least 1, got {asked.pairs}")
    if not 0 <= asked.port < 1 << 16:
        raise UsageError(f"lit-rlft vote: --port must be in [0, 65535], got {asked.port}")
    return asked


def _ballot(run: Path, asked: Namespace) -> Ballot:
    if not run.is_dir():
        raise UsageError(f"there is no run {run}; give its folder, such as runs/demo")
    if asked.blind:
        return blind_ballot(run)
    if not asked.samples and (run / FOLDER).is_dir() and not _only_samples(run):
        return fit_ballot(run)
    if (run / "samples.jsonl").is_file():
        return samples_ballot(run, asked.pairs)
    raise UsageError(
        f"{run} holds nothing to judge; start a fit with the reward HumanPreference, or write "
        f"samples with `lit-rlft predict --name {run.name}`"
    )


def _only_samples(run: Path) -> bool:
    """Return whether samples were judged there and no fit has asked anything."""
    asked = any((run / FOLDER).glob("questions_*.jsonl"))
    return not asked and (run / "samples.jsonl").is_file()


def _token(folder: Path) -> str:
    """Return the token of a folder, the same whenever its server starts: open pages go on.

    The file can be read by its owner alone.
    """
    path = folder / _TOKEN
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if token := path.read_text(encoding="utf-8").strip():
            return token
        path.unlink()
        return _token(folder)
    token = secrets.token_urlsafe(16)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(token)
    return token


def _summary(ballot: Ballot) -> str:
    told = ballot.next("summary")
    ballot.votes.refresh()
    number, path = len(ballot.votes.by_question), ballot.votes.path
    text = f"{number} votes in {path}" if number else "no votes"
    return text + (f"\n{told['result']}" if told.get("result") else "")
