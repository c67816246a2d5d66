"""Runs a mutated command in this process and says which of the rules it breaks.

A command that must fail ends with one sentence under 300 characters, which begins with
`lit-rlft: error:` and names the key or the file, with an exit code other than 0 and without a
traceback. Nothing that was there changes, and nothing appears outside the run's folder. A mutation
can also leave a valid command: it then ends well.

Only the mixture is trained, for one round. A fit in any other domain stops where the trainer would
begin: the config was parsed, all classes were made, and model and data were set up, which is all
that comes before anything is sampled. A command that still works after `SECONDS` is stopped and
counts as valid: huge sizes are the user's own affair.
"""

import hashlib
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from lightning import LightningDataModule, Trainer

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main

SECONDS = 20
LONGEST = 300
_FIT = Trainer.fit
_BEGINNING = "lit-rlft: error: "


class Stopped(BaseException):
    """The command works for long."""


def broken_rules(words: Sequence[str], names: Sequence[str], run: str = "run") -> list[str]:
    """Return what is wrong with how a command ends, nothing if all is well.

    Args:
        words: The command, in the working directory.
        names: What its message may name, one of which it must.
        run: Name of the run.
    """
    before = _files()
    message = _message(words)
    after = _files()
    wrong = [f"wrote {path}" for path in after if _is_stray(path, before, run)]
    wrong += [f"changed {path}" for path, digest in before.items() if after.get(path, "") != digest]
    if message is None:
        return wrong
    if not message.startswith(_BEGINNING) or "\n" in message.strip():
        return [*wrong, f"no single sentence: {message[-1500:]}"]
    if (length := len(message.replace(str(Path.cwd()), ""))) >= LONGEST:
        wrong.append(f"{length} characters: {message}")
    if "Traceback" in message or "Union subtypes" in message:
        wrong.append(f"the parser's or Python's own words: {message}")
    if not any(name.lower() in message.lower() for name in names if name):
        wrong.append(f"names none of {[*names]}: {message}")
    return wrong


def _message(words: Sequence[str]) -> str | None:
    """Return what a command that fails says, None for one that ends well."""
    shown = StringIO()
    try:
        with _limited(), _without_training(), redirect_stdout(StringIO()), redirect_stderr(shown):
            main([*words])
    except Stopped:
        return None
    except SystemExit as error:
        if error.code in (None, 0):
            return None
        return error.code if isinstance(error.code, str) else shown.getvalue()
    except BaseException:
        return traceback.format_exc()
    return None


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Stopped

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def _without_training() -> Iterator[None]:
    def fit(
        trainer: Trainer, model: RewardFineTuner, datamodule: LightningDataModule, **rest: Any
    ) -> None:
        if isinstance(model.pipeline, GaussianMixturePipeline):
            _FIT(trainer, model, datamodule=datamodule, **rest)
            return
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.setup("fit")

    with mock.patch.object(Trainer, "fit", fit):
        yield


def _files() -> dict[str, str]:
    """Return a digest of each file in the working directory."""
    found = (Path(root, name) for root, _, names in os.walk(".") for name in names)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _is_stray(path: str, before: dict[str, str], run: str) -> bool:
    own = (f"runs/{run}/", "cache/")
    return path not in before and not path.startswith(own) and "__pycache__" not in path
