"""What a tuned model's folder says about itself, for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_rlft.core.checks import UsageError, loading
from lit_rlft.runs.files import write_whole

__all__ = ["CARD", "read_card", "write_card"]

CARD = "lit_rlft.json"


def write_card(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write facts that JSON can hold into a folder; return the file."""
    return write_whole(folder / CARD, json.dumps(dict(facts), indent=2) + "\n")


def read_card(folder: Path) -> dict[str, Any]:
    """Return what `write_card` wrote.

    Raises:
        UsageError: There is none, or it is no JSON object.
    """
    path = folder / CARD
    if not path.is_file():
        raise UsageError(f"{folder} has no {CARD}; give the folder `tuned` of a run")
    with loading(f"{path} cannot be read; export the run again"):
        card = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(card, dict):
        raise UsageError(f"{path} holds no JSON object; export the run again")
    return card
