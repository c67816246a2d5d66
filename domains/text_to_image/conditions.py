"""Conditions of text-to-image models: prompts with what the data have beside them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.families.base import Family
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import PAIR, Batch, Condition, check_columns

__all__ = ["encode_prompts"]


def encode_prompts(batch: Batch, family: Family, negative_prompt: str | None) -> Condition:
    """Encode `batch["prompt"]`, each unique prompt once, and the negative prompt last.

    Prompts that are the same with other columns beside them are conditions of their own.

    Args:
        batch: Columns of the data.
        family: With the text encoders.
        negative_prompt: Of the unconditional prediction; None takes what diffusers takes.

    Raises:
        UsageError: The rows have no prompt, or one that is no text.
    """
    check_columns(batch, ["prompt"], "a text-to-image model")
    if others := [prompt for prompt in batch["prompt"] if not isinstance(prompt, str)]:
        kind = type(others[0]).__name__
        raise UsageError(f"a prompt of the data is a {kind}, {others[0]!r}; it must be a text")
    columns = [name for name in batch if name not in ("index", PAIR)]
    records = [{name: batch[name][i] for name in columns} for i in range(len(batch["prompt"]))]
    first: dict[str, int] = {}
    places = [first.setdefault(_identity(record), i) for i, record in enumerate(records)]
    entries = [records[i] for i in first.values()]
    numbers = batch["index"].tolist() if "index" in batch else range(len(records))
    prompts: dict[str, int] = {}
    for i in first.values():
        prompts.setdefault(records[i]["prompt"], int(numbers[i]))
    family.tell_cuts(list(prompts), list(prompts.values()))
    tables = family.tables(list(prompts), negative_prompt)
    if len(prompts) < len(entries):
        known = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([*(known[entry["prompt"]] for entry in entries), len(prompts)])
        tables = {name: table[rows.to(table.device)] for name, table in tables.items()}
    row_of = {place: row for row, place in enumerate(first.values())}
    return Condition(
        entries=entries,
        tables=tables,
        rows=torch.tensor([row_of[place] for place in places]),
        null=len(entries),
    )


def _identity(record: Mapping[str, Any]) -> str:
    """Return what tells a record from others: all that is in it but tensors."""
    return repr({name: value for name, value in record.items() if not isinstance(value, Tensor)})
