"""A reward behind a URL: samples go out as files, numbers come back."""

import base64
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Sequence
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError, at_least, from_json, positive
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.core.settings import without_secrets
from lit_rlft.kit.records import plain

__all__ = ["HTTPReward"]

_LARGEST = 1 << 24
"""Bytes of an answer that are read; numbers take far less."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0


class HTTPReward(Reward):
    """Asks a server for the rewards.

    The server gets a POST with a JSON object, `{"samples": [...]}`. A sample has `file`, its name;
    `data`, the file in base64; and `condition`, the record that the reward is given of, such as
    `{"prompt": "a red ring"}`. Files are what `predict` writes: PNG pictures, layouts as JSON,
    molecules as SDF. The server answers with `{"rewards": [...]}`: a number per sample, in order,
    or null for one that it could not score.

    A request that fails is made again. One that fails for good costs its samples: they are left
    out, counted and said once by each process, and the run goes on. Before the run an empty list of
    samples is sent, to which `{"rewards": []}` is the answer.

    Args:
        url: Where the server listens, http or https. A variable of the environment, such as
            `http://host/score?key=$SCORER_KEY`, is put in as it is asked and stands in no file.
        batch_size: Samples per request.
        timeout: Seconds until a request has failed.
        retries: How often a failed request is made again, after 0.5, 1, 2, ... seconds.

    Raises:
        BadArgument: The URL is none of http, or a number is impossible.
        UsageError: At the start: nobody answers there, or something else than rewards.
    """

    waits = True

    def __init__(
        self, url: str, batch_size: int = 16, timeout: float = 60.0, retries: int = 3
    ) -> None:
        super().__init__()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            problem = f"must be such as http://localhost:8000/score, got {url!r}"
            raise BadArgument(self, "url", problem)
        at_least(1, self, batch_size=batch_size)
        at_least(0, self, retries=retries)
        positive(self, timeout=timeout)
        self.url, self.batch_size = url, batch_size
        self._address = without_secrets(url)
        self.timeout, self.retries = timeout, retries
        self._pipeline: tuple[Pipeline, ...] = ()  # a tuple, or it would be a part of the reward
        self._said = False

    def check(self, pipeline: Pipeline) -> None:
        self._pipeline = (pipeline,)
        try:
            self._ask([])
        except _NoRewards as error:
            names = re.findall(r"\$\{?(\w+)", self.url)
            unset = [f"export {name}=...; " for name in names if name not in os.environ]
            raise UsageError(
                f"HTTPReward: {self._address} gave no rewards at the start ({error}); "
                f"{''.join(unset)}start the server, which must answer "
                '{"samples": []} with {"rewards": []}'
            ) from error

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        rewards: list[float] = []
        for start in range(0, len(condition), self.batch_size):
            rows = torch.arange(start, min(start + self.batch_size, len(condition)))
            (pipeline,) = self._pipeline
            part = pipeline.index_samples(samples, rows)
            rewards += self._scored(self._packed(part, condition.index(rows)))
        return torch.tensor(rewards)

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take the pipeline along."""
        held = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**held, "_pipeline": ()}

    def _packed(self, samples: Any, condition: Condition) -> list[dict[str, Any]]:
        (pipeline,) = self._pipeline
        names = [f"{i:05}" for i in range(len(condition))]
        with tempfile.TemporaryDirectory() as folder:
            files = pipeline.save_samples(samples, condition, Path(folder), names)
            return [
                {
                    "file": file.name,
                    "data": base64.b64encode(file.read_bytes()).decode(),
                    "condition": plain(entry),
                }
                for file, entry in zip(files, condition.each(), strict=True)
            ]

    def _scored(self, packed: Sequence[dict[str, Any]]) -> list[float]:
        """Return the rewards of samples, NaN where the server gives none."""
        try:
            return self._ask(packed)
        except _NoRewards as error:
            if not self._said:
                self._said = True
                # On every process: each knows its own answers alone.
                warnings.warn(
                    f"HTTPReward: {self._address} gave no rewards for {len(packed)} samples "
                    f"({error}); they are left out, and further failures are not said",
                    stacklevel=2,
                )
            return [math.nan] * len(packed)

    def _ask(self, packed: Sequence[dict[str, Any]]) -> list[float]:
        body = json.dumps({"samples": list(packed)}).encode()
        wait = _FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return _rewards_in(self._post(body), len(packed))
            except _NoRewards:
                if attempt == self.retries:
                    raise
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError

    def _post(self, body: bytes) -> bytes:
        request = Request(os.path.expandvars(self.url), body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                found: bytes = answer.read(_LARGEST + 1)
        except HTTPError as error:
            raise _NoRewards(f"status {error.code}") from error
        except (InvalidURL, UnicodeError):  # whose words hold what the environment put in
            raise _NoRewards("its characters, or those of its variables, are no URL's") from None
        except (OSError, HTTPException) as error:
            raise _NoRewards(str(getattr(error, "reason", None) or error)[:100]) from error
        if len(found) > _LARGEST:
            raise _NoRewards(f"an answer of more than {_LARGEST >> 20} MB")
        return found


class _NoRewards(Exception):
    """A server's answer holds no rewards; the message is why."""


def _rewards_in(answer: bytes, num_samples: int) -> list[float]:
    try:
        held = from_json(answer)
    except ValueError:
        start = answer[:40].decode(errors="replace")
        raise _NoRewards(f"the answer is no JSON but {start!r}") from None
    rewards = held.get("rewards") if isinstance(held, dict) else None
    if not isinstance(rewards, list):
        raise _NoRewards('the answer has no list "rewards"')
    if len(rewards) != num_samples:
        raise _NoRewards(f"{len(rewards)} rewards for {num_samples} samples")
    if any(isinstance(r, bool) or not isinstance(r, int | float | None) for r in rewards):
        raise _NoRewards("a reward is neither a number nor null")
    try:
        return [math.nan if reward is None else float(reward) for reward in rewards]
    except OverflowError:  # a whole number of hundreds of digits
        raise _NoRewards("a reward is too large a number") from None
