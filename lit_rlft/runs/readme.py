"""The model card of a tuned model's folder, README.md, for people and for the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_rlft.core.checks import from_json
from lit_rlft.runs.card import CARD
from lit_rlft.runs.files import write_whole

__all__ = ["README", "add_results", "readme"]

README = "README.md"

_START, _END = "<!-- results -->", "<!-- end of results -->"
_NO_RESULTS = (
    "Not measured yet. `lit-rlft test --config <run>/config.yaml --ckpt_path "
    "<run>/checkpoints/last.ckpt` measures the tuned model beside its base and writes the numbers "
    "here."
)
_USE = (
    "`lit-rlft predict --config <run>/config.yaml --ckpt_path <run>/checkpoints/last.ckpt` draws "
    "samples."
)


def readme(
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    header: Mapping[str, Any],
    base: str,
    usage: str,
) -> str:
    """Return a model card.

    Args:
        facts: `algorithm`, `reward` and the counters of the training, by name; where it has them,
            `num_steps`, `tuned_steps`, `skipped_steps` and `ema_decay`.
        settings: Settings of the run by key; of absolute paths the last part alone is told.
        header: What the hub reads, for its YAML header; empty for none.
        base: The pretrained model's name.
        usage: Markdown: how to draw samples; empty for how to do so with lit-rlft.
    """
    parts = [] if not header else ["\n".join(["---", *_yaml(header), "---"])]
    parts += [
        f"# {base}, tuned for {facts['reward']}",
        f"Fine-tuned from {base} by {facts['algorithm']} with lit-rlft, for the reward "
        f"{facts['reward']}: {facts['num_rounds']} rounds, {facts['num_updates']} updates, "
        f"{facts['num_samples']} samples." + _average(facts) + _part(facts),
        "## Use",
        usage or _USE,
        "## Results",
        f"{_START}\n{_NO_RESULTS}\n{_END}",
        "## Settings",
        "\n".join(["| setting | value |", "|---|---|", *_rows(settings)]),
        "## Licence",
        "These are weights derived from the base model, so the base model's licence applies to "
        "them too; that of the reward model may restrict what they are used for.",
    ]
    return "\n\n".join(parts) + "\n"


def add_results(folder: Path, report: Mapping[str, Any], num_updates: int) -> Path | None:
    """Write the numbers of a test into a tuned model's card; return the card.

    Args:
        folder: The tuned model's.
        report: Mean and standard error by arm (`reference`, `tuned`, `gain`) and metric.
        num_updates: Of the model that was measured; a card of another one stays as it is.
    """
    path = folder / README
    try:
        text = path.read_text(encoding="utf-8")
        card = from_json((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    start, end = text.find(_START), text.find(_END)
    if not isinstance(card, dict) or card.get("num_updates") != num_updates or not 0 <= start < end:
        return None
    rows = [
        f"| {name} | {_number(report['reference'].get(name))} | {_number(measured)} | "
        f"{_number(report['gain'].get(name))} |"
        for name, measured in report["tuned"].items()
    ]
    table = ["| metric | base | tuned | gain |", "|---|---|---|---|", *rows]
    count = f"Means and standard errors of {report['num_samples']} samples, seed {report['seed']}."
    body = "\n".join([_START, *table, "", count])
    return write_whole(path, f"{text[:start]}{body}\n{text[end:]}")


def _average(facts: Mapping[str, Any]) -> str:
    """Return a sentence on weights that are an average; empty for others."""
    if "ema_decay" not in facts:
        return ""
    return f" The weights are their average over training (EMA, decay {facts['ema_decay']:g})."


def _part(facts: Mapping[str, Any]) -> str:
    """Return a sentence on a model that runs some steps alone; empty for others."""
    number, total = facts.get("tuned_steps", 0), facts.get("num_steps", 0)
    if not 0 < number < total:
        return ""
    first = facts.get("skipped_steps", 0)
    which = f"steps {first + 1} to {first + number}" if first else f"the first {number}"
    return f" It is for {which} of {total} steps; the base model runs the others."


def _number(moments: Mapping[str, float | None] | None) -> str:
    mean = moments and moments.get("mean")
    if mean is None:
        return ""
    sem = moments and moments.get("sem")
    return f"{mean:.4g}" if sem is None else f"{mean:.4g} ± {sem:.2g}"


def _yaml(header: Mapping[str, Any]) -> list[str]:
    """Return lines of YAML; JSON's strings and lists are YAML's too."""
    return [f"{name}: {json.dumps(value)}" for name, value in header.items()]


def _rows(settings: Mapping[str, Any]) -> list[str]:
    kept = {key: value for key, value in settings.items() if not key.endswith(".length")}
    return [f"| {key} | {_told(value)} |" for key, value in sorted(kept.items())]


def _told(value: Any) -> str:
    """Return a setting in a table's cell; no path of this machine."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return str(value).replace("|", "\\|").replace("\n", " ")
