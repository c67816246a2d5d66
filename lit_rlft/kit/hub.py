"""What can go wrong on the way to a model of the Hugging Face hub, in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_rlft.core.checks import UsageError

__all__ = ["hub_errors"]

_UNREACHED = (
    "{id!r} is not in the hub's cache as a whole, and the hub could not be reached{why}; run "
    "`hf download {id}` on a machine with internet access and copy its cache or folder here"
)
_OFFLINE = " (HF_HUB_OFFLINE is set)"
_PROBLEMS: tuple[tuple[str, str], ...] = (
    (
        "GatedRepoError",
        "{id!r} asks for consent to its licence; accept it on the model's page on the hub, then "
        "run `hf auth login` with a token of that account",
    ),
    (
        "RepositoryNotFoundError",
        "the hub has no model {id!r}, or you may not see it; check the name, and for a private "
        "model run `hf auth login`",
    ),
    (
        "RevisionNotFoundError",
        "the hub's model {id!r} has no such revision; check the name",
    ),
    ("OfflineModeIsEnabled", _UNREACHED.replace("{why}", _OFFLINE)),
    ("LocalEntryNotFoundError", _UNREACHED.replace("{why}", "")),
    ("ConnectionError", _UNREACHED.replace("{why}", "")),
    ("TransportError", _UNREACHED.replace("{why}", "")),
    (
        "EntryNotFoundError",
        "the hub's model {id!r} lacks a file that is needed ({reason}); check the name, and the "
        "variant where one is set",
    ),
)
"""Names of the hub's errors, the first that applies counts, and what to do."""


@contextmanager
def hub_errors(source: str, key: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence with the remedy; all others pass.

    The libraries that download wrap the hub's errors, so what an error came from counts too.

    Args:
        source: What is read in the block: a hub id; an existing path has no such errors.
        key: The setting that holds it.

    Raises:
        UsageError: The hub has no such model, asks for a consent, or cannot be reached.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not Path(source).exists():
            for name, sentence in _PROBLEMS:
                for cause in _chain(error):
                    if any(kind.__name__ == name for kind in type(cause).__mro__):
                        reason = str(cause).strip().partition("\n")[0]
                        text = sentence.format(id=source, reason=reason)
                        raise UsageError(f"{key}: {text}") from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and those it was raised from, or while handling them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
