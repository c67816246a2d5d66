"""The page: one HTML file that opens by double click and asks the network for nothing."""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from lit_rlft.core.checks import UsageError
from lit_rlft.report import tables
from lit_rlft.report.comparable import same_noise
from lit_rlft.report.payload import Payload, payload
from lit_rlft.report.run import Run, check_domain, distinct_names, read_run
from lit_rlft.runs.files import write_whole, writing
from lit_rlft.runs.plain import told

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
"""Name of the file in a run's folder."""

_LEVEL = 6
"""Of compression: higher ones take several times as long for a hundredth of the size."""

_ASSETS = Path(__file__).parent / "assets"


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the report of runs; return its file.

    Args:
        folders: Those of the runs, one or more.
        path: Where to write it.

    Raises:
        UsageError: A folder is none of a run, or is damaged; the runs are of different domains;
            the file cannot be written.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    distinct_names(runs)
    check_domain(runs)
    text = page(runs)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    with writing(path):
        return write_whole(path, text)


def page(runs: Sequence[Run]) -> str:
    """Return the report of runs as HTML."""
    drawn = payload(runs)
    first = runs[0]
    algorithms = dict.fromkeys(str(run.settings.get("model", "")) for run in runs)
    model = told(str(first.metrics.get("domain") or first.settings.get("pipeline")))
    title = f"{', '.join(algorithms)} on {model}"
    rewards = dict.fromkeys(run.reward for run in runs if run.reward)
    title += f" for {', '.join(rewards)}" if rewards else ""
    several = f": {len(runs)} runs" if len(runs) > 1 else ""
    return Template(_asset("page.html")).substitute(
        title=escape(title + several),
        style=_asset("page.css"),
        body="\n".join(_sections(runs, drawn)),
        library=_library(),
        data=_packed(json.dumps(drawn, separators=(",", ":"))),
        script=_asset("page.js"),
    )


def _sections(runs: Sequence[Run], drawn: Payload) -> list[str]:
    settings = "Settings that differ" if len(runs) > 1 else "Settings"
    parts: dict[str, tuple[str, str]] = {
        "settings": (settings, tables.differences(runs)),
        "gains": ("Gains", tables.gains(runs)),
        "curves": ("Curves", _curves(drawn)),
        "samples-section": ("Before and after", _samples(runs, drawn)),
        "hacking": ("Is the reward exploited?", _hacking(drawn)),
        "extremes-section": ("Best, worst and most changed samples", _extremes(drawn)),
        "costs": ("Cost by phase", tables.costs(runs)),
        "warnings": ("Warnings", tables.told_warnings(runs)),
    }
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, (name, _) in parts.items())
    sections = [
        f'<section id="{key}"><h2>{escape(name)}</h2>{text}</section>'
        for key, (name, text) in parts.items()
    ]
    wait = '<p id="wait">Drawing the curves and samples …</p>'
    return [tables.facts(runs), tables.notes(runs), f"<nav>{links}</nav>", wait, *sections]


def _curves(drawn: Payload) -> str:
    if not drawn["charts"]:
        return "<p>None: nothing of the training was logged.</p>"
    return (
        '<div class="controls"><label>over <select id="axis"></select></label>'
        '<span class="note">solid: tuned, dashed: reference, both on validation data; dotted: '
        "training</span></div>"
        '<div class="charts" id="charts"></div>'
        '<details id="further"><summary>further curves</summary>'
        '<div class="charts" id="further-charts"></div></details>'
    )


def _samples(runs: Sequence[Run], drawn: Payload) -> str:
    if not drawn["checkpoints"]:
        return "<p>None: the runs kept no samples at validations that they have in common.</p>"
    note = ""
    if len(runs) > 1 and not same_noise(runs):
        note = (
            "<p>The runs do not draw from the same conditions and noise (see the settings that "
            "differ), so the first one's samples are shown alone.</p>"
        )
    return (
        f'{note}<div class="controls"><input type="range" id="slider" min="0" step="1" '
        'aria-label="checkpoint"><span id="place"></span></div>'
        "<p>The same conditions and noise at every checkpoint; select a sample to enlarge it.</p>"
        '<div class="tiles" id="samples"></div>'
    )


def _hacking(drawn: Payload) -> str:
    if not drawn["hacking"]:
        return "<p>Nothing to tell by: the runs measured nothing that they were not trained on.</p>"
    return (
        '<div class="controls"><label>held out <select id="guard"></select></label></div>'
        '<div class="chart wide" id="pareto"></div>'
        "<p>Each point is a checkpoint on validation data, the pretrained model at 0; bars are two "
        "standard errors. Filled points are on the Pareto front: no other checkpoint is better in "
        "both. A curve that bends away from the better side is a reward being exploited.</p>"
    )


def _extremes(drawn: Payload) -> str:
    if not drawn["extremes"]:
        return "<p>None: they are kept by a test of this version.</p>"
    return (
        '<div class="controls"><label>show <select id="kind"></select></label></div>'
        '<div id="extremes"></div>'
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Return the library that draws the curves, packed.

    Raises:
        UsageError: It is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise UsageError(
            "a report needs plotly, which draws its curves; pip install plotly"
        ) from error
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), _LEVEL, mtime=0)).decode()
