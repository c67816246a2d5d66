"""The tables of a report, as HTML; all text of a run is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lit_rlft.report.comparable import same_reward
from lit_rlft.report.numbers import DASH, duration, short, value, with_error
from lit_rlft.report.payload import COLORS
from lit_rlft.report.run import Run, settings_that_differ
from lit_rlft.runs.plain import Plain, told

__all__ = ["costs", "differences", "facts", "gains", "notes", "table", "told_warnings"]

_LONGEST = 400
"""Characters of a setting that are shown."""
_SURE = 2.0
"""Standard errors of a gain that is shown in bold."""


def table(header: Sequence[str], rows: Iterable[str]) -> str:
    """Return a table; cells of its header are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def facts(runs: Sequence[Run]) -> str:
    """Return which runs they are."""
    rows = []
    for i, run in enumerate(runs):
        done = run.metrics.get("checkpoint")
        counts = done if isinstance(done, Mapping) else {}
        cost = run.metrics.get("cost", {})
        dot = f'<span class="dot" style="background:{COLORS[i % len(COLORS)]}"></span>'
        cells = (
            f"<td>{dot}{escape(run.name)}</td>",
            _cell(_text(run.settings.get("model"))),
            _cell(told(str(run.metrics.get("domain", _text(run.settings.get("pipeline")))))),
            _cell(run.reward or _text(run.settings.get("reward"))),
            _cell(short(counts.get("num_rounds"))),
            _cell(short(counts.get("num_updates"))),
            _cell(short(cost.get("reward_calls"))),
            _cell(duration(cost.get("seconds"))),
            _cell(_text(run.metrics.get("seed", run.settings.get("model.seed")))),
            _cell(short(run.metrics.get("num_samples"))),
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = ("run", "algorithm", "model", "reward", "rounds", "updates", "reward calls")
    return table([*header, "training", "seed", "samples tested"], rows)


def differences(runs: Sequence[Run]) -> str:
    """Return the settings that are not the same in all runs, and all settings to unfold."""
    parts = []
    if len(runs) > 1:
        differ = settings_that_differ(runs)
        rows = [_row(key, map(_text, values)) for key, values in differ.items()]
        head = ["setting", *(escape(run.name) for run in runs)]
        parts.append(table(head, rows) if rows else "<p>The runs have the same settings.</p>")
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [_row(key, (_text(run.settings.get(key)) for run in runs)) for key in keys]
    whole = table(["setting", *(escape(run.name) for run in runs)], rows)
    return "".join([*parts, f"<details><summary>all settings</summary>{whole}</details>"])


def gains(runs: Sequence[Run]) -> str:
    """Return every measurement of the reference and the tuned models, and the gains."""
    tested = [run for run in runs if run.metrics]
    if not tested:
        return "<p>The runs have not been tested.</p>"
    names = dict.fromkeys(name for run in tested for name in run.metrics["tuned"])
    kept = any("kept" in run.metrics for run in tested)
    shared = _shared_reference(tested, names)
    header = ["measurement", *([] if shared is None else ["reference"])]
    for run in tested:
        own = f" {escape(run.name)}" if len(tested) > 1 else ""
        header += [f"reference{own}"] if shared is None else []
        header += [f"tuned{own}", f"gain{own}", *([f"share kept{own}"] if kept else [])]
    rows = []
    rewards = {run.reward for run in tested}
    for name in sorted(names, key=lambda name: name not in rewards):
        cells = [] if shared is None else [_cell(shared[name])]
        for run in tested:
            cells += [_moments(run, "reference", name)] if shared is None else []
            cells += [_moments(run, "tuned", name), _gain(run, name)]
            cells += [_moments(run, "kept", name)] if kept else []
        main = ' class="main"' if name in rewards else ""
        rows.append(f"<tr{main}><td>{escape(name)}</td>{''.join(cells)}</tr>")
    signs = [sentence for run in tested if (sentence := _signs(run, len(tested) > 1))]
    return table(header, rows) + _told_errors(tested) + "".join(signs)


def costs(runs: Sequence[Run]) -> str:
    """Return what each phase of each stage took."""
    books = [run.metrics.get("cost", {}).get("phases", {}) for run in runs]
    keys = dict.fromkeys(
        (stage, phase) for book in books for stage, page in book.items() for phase in page
    )
    if not keys:
        return "<p>Nothing is known of the costs: they are written by a test.</p>"
    pages = [page for book in books for part in book.values() for page in part.values()]
    seconds = [page["seconds"] for page in pages]
    longest, rows = max([*seconds, 1e-9]), []
    for stage, phase in keys:
        cells = []
        for i, book in enumerate(books):
            page = book.get(stage, {}).get(phase, {})
            width = 100 * page.get("seconds", 0.0) / longest
            color = COLORS[i % len(COLORS)]
            bar = f'<span class="bar" style="width:{width:.1f}px;background:{color}"></span>'
            cells.append(f'<td style="text-align:left">{bar} {duration(page.get("seconds"))}</td>')
            for count in ("denoiser_calls", "reward_calls", "flops"):
                cells.append(_cell(short(page.get(count))))
        rows.append(f"<tr><td>{escape(stage)}: {escape(phase)}</td>{''.join(cells)}</tr>")
    header = ["phase"]
    for run in runs:
        own = f" {escape(run.name)}" if len(runs) > 1 else ""
        header += [f"time{own}", "denoiser calls", "reward calls", "operations"]
    return table(header, rows)


def told_warnings(runs: Sequence[Run]) -> str:
    """Return what the runs warned of."""
    parts = []
    for run in runs:
        if len(runs) > 1 and run.warnings:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        items = [f"<li>{escape(stage)}: {escape(text)}</li>" for stage, text in run.warnings]
        parts.append(f'<ul class="warnings">{"".join(items)}</ul>' if items else "")
    return "".join(parts) or "<p>None.</p>"


def notes(runs: Sequence[Run]) -> str:
    """Return what is missing or damaged."""
    items = [
        f"<li>{escape(run.name)}: {escape(told(note))}</li>"
        for run in runs
        for note in dict.fromkeys(run.notes)
    ]
    return f'<ul class="warnings">{"".join(items)}</ul>' if items else ""


def _signs(run: Run, several: bool) -> str:
    names = run.metrics.get("exploitation") or []
    if not names:
        return ""
    own = f"{escape(run.name)}: " if several else ""
    listed = escape(", ".join(map(str, names)))
    reward = escape(run.reward) or "the reward"
    return (
        f'<p class="sign">{own}{reward} rose while these became worse, beyond three standard '
        f"errors: {listed}. It may be exploited: look at the samples.</p>"
    )


def _shared_reference(runs: Sequence[Run], names: Iterable[str]) -> dict[str, str] | None:
    """Return the reference's numbers by name as they are shown; None where those of runs differ."""
    found = {}
    for name in names:
        measured = [run.metrics["reference"].get(name) for run in runs]
        texts = {with_error(one) for one in measured if one}
        if len(texts) > 1:
            return None
        found[name] = next(iter(texts), DASH)
    return found


def _told_errors(runs: Sequence[Run]) -> str:
    text = (
        "<p>Means over the test's samples ± standard errors. The gain is tuned minus reference "
        "from the same conditions and noise; bold where it is beyond two standard errors.</p>"
    )
    if not same_reward(runs):
        text += (
            "<p>The runs were trained on different rewards (see the settings that differ): the "
            "gain of one is no measure of another.</p>"
        )
    return text


def _moments(run: Run, arm: str, name: str) -> str:
    return _cell(with_error(run.metrics.get(arm, {}).get(name)))


def _gain(run: Run, name: str) -> str:
    gain: Mapping[str, Any] = run.metrics.get("gain", {}).get(name) or {}
    mean, sem = gain.get("mean"), gain.get("sem")
    sure = mean is not None and sem is not None and abs(mean) > _SURE * sem
    bad = name in (run.metrics.get("exploitation") or [])
    kind = " ".join([*(["sure"] if sure else []), *(["sign"] if bad else [])])
    return f'<td class="{kind}">{with_error(gain)}</td>' if kind else _cell(with_error(gain))


def _row(name: str, cells: Iterable[str]) -> str:
    return f"<tr><td>{escape(name)}</td>{''.join(map(_cell, cells))}</tr>"


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > 24 else ""
    return f"<td{kind}>{escape(text)}</td>"


def _text(setting: Plain) -> str:
    if setting is None:
        return DASH
    return value(setting) if isinstance(setting, float) else str(setting)[:_LONGEST]
