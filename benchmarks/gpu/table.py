"""The documentation's page on GPUs, drawn from the files of results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.parts.fits import MODELS
from benchmarks.gpu.runs import finished
from lit_rlft.runs.lines import read_lines

__all__ = ["PAGE", "RESULTS", "page"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
NOTHING = "not measured yet"

Row = dict[str, Any]
Rows = Sequence[Row]
Results = dict[str, list[Row]]
"""The rows of each part that is finished."""
Cell = Callable[[Row, Results], str]

_HEAD = """\
# What does it reach on a GPU?

    python -m benchmarks.gpu          # about 25 minutes on a GPU; goes on where it was interrupted
    python -m benchmarks.gpu table    # this page, from benchmarks/results/*.jsonl

Models have the real architectures and random weights, which cost what real ones do. Times are
medians of turns (quartiles), the device's work included; memory is the peak of what is allocated,
in GiB. "Share" is that of the bf16 matrix product measured in the same run, by counted operations.
What a part does stands in the first lines of its file in `benchmarks/gpu/parts/`.
"""


class Table(NamedTuple):
    """The table of a part.

    Attributes:
        title: Its heading.
        expected: First cells of the rows there will be, for as long as nothing is measured.
        columns: Headings and what their cells say of a row.
    """

    title: str
    expected: Sequence[str]
    columns: dict[str, Cell]


def _number(value: float | None, digits: str = ".3g") -> str:
    """Return a number with `digits`; of 1,000 and more all digits before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{digits}}"


def _get(key: str, digits: str = ".3g") -> Cell:
    def cell(row: Row, results: Results) -> str:
        value = row.get(key)
        return value if isinstance(value, str) else _number(value, digits)

    return cell


def _time(row: Row, results: Results) -> str:
    if "seconds" not in row:
        return ""
    low, middle, high = (_number(1000 * row[name]) for name in ("low", "seconds", "high"))
    return f"{middle} ({low}-{high})"


def _rate(key: str) -> Cell:
    def cell(row: Row, results: Results) -> str:
        return _number(row[key] / row["seconds"]) if "seconds" in row else ""

    return cell


def _share(row: Row, results: Results) -> str:
    share = _share_of(row, results)
    return "" if share is None else f"{share:.0%}"


def _share_of(row: Row, results: Results) -> float | None:
    """Return a row's operations per second over those of the bf16 product."""
    peak = _find(results, "limits", what="bf16")
    if peak is None or "seconds" not in peak or "seconds" not in row:
        return None
    return float(row["flops"] / row["seconds"] / (peak["flops"] / peak["seconds"]))


def _find(results: Results, part: str, **keys: Any) -> Row | None:
    rows = results.get(part, [])
    return next((row for row in rows if all(row.get(k) == v for k, v in keys.items())), None)


def _limit(row: Row, results: Results) -> str:
    if "seconds" not in row:
        return ""
    if "bytes" in row:
        return f"{row['bytes'] / row['seconds'] / 1e9:,.0f} GB/s"
    return f"{row['flops'] / row['seconds'] / 1e12:,.1f} TFLOP/s"


def _beside(part: str, **other: Any) -> Cell:
    """Return a cell with another row's seconds over this one's."""

    def cell(row: Row, results: Results) -> str:
        found = _find(results, part, **{k: row.get(k) if v is ... else v for k, v in other.items()})
        known = found is not None and "seconds" in found and "seconds" in row
        return f"{found['seconds'] / row['seconds']:.2f}" if found and known else ""

    return cell


TABLES: dict[str, Table] = {
    "limits": Table(
        "Limits", ("bf16", "fp32", "TF32", "copy"), {"what": _get("what"), "reached": _limit}
    ),
    "sampling": Table(
        "Sampling of Stable Diffusion 1.5, from prompts to pictures, bf16, guided",
        [f"{n} x {arm}" for n in (1, 8, 32) for arm in ("official", "ours", "ours, compiled")],
        {
            "pictures x arm": lambda row, _: f"{row['batch']} x {row['arm']}",
            "ms": _time,
            "pictures per s": _rate("batch"),
            "share": _share,
            "times the official speed": _beside("sampling", batch=..., arm="official"),
            "peak": _get("peak_gib"),
        },
    ),
    "replay": Table(
        "DDPO's update, beside a plain loop of TRL's shape on the same modules",
        ("ours, 1", "ours, 4", "ours, 16", "ours, 80", "plain loop, 1", "plain loop, 16"),
        {
            "pairs at a time": _get("arm"),
            "ms per update": _time,
            "pairs per s": _rate("pairs"),
            "times the loop of 1": _beside("replay", arm="plain loop, 1"),
            "peak": _get("peak_gib"),
        },
    ),
    "toggles": Table(
        "Each switch alone: times the speed without it, and peak memory without / with it",
        (
            *("frozen weights in fp32", "channels last", "block checkpointing"),
            *("compile: blocks", "compile: whole", "LoRA merged"),
            "TF32, all in fp32",
        ),
        {
            "switch": _get("toggle"),
            "call": _get("call_speedup", ".2f"),
            "peak of a call": lambda row, _: _pair(row, "call"),
            "forward and backward": _get("train_speedup", ".2f"),
            "peak of both": lambda row, _: _pair(row, "train"),
        },
    ),
    "drtune": Table(
        "DRTune's update",
        [f"K = {k}{on}" for k in (1, 2, 4) for on in ("", ", checkpointed")],
        {
            "trained steps": _get("arm"),
            "ms per update": _time,
            "pictures per s": _rate("pictures"),
            "peak": _get("peak_gib"),
        },
    ),
    "sdxl_memory": Table(
        "Rounds of SDXL with a LoRA at 1,024 pixels, one sample at a time",
        ("P-GRAFT", "DDPO", "DRTune"),
        {
            "algorithm": _get("algorithm"),
            "peak": _get("peak_gib"),
            "collect": _get("collect_peak_gib"),
            "update": _get("update_peak_gib"),
            "reserved": _get("reserved_gib"),
            "s of an update": _get("update_seconds"),
        },
    ),
    "decode": Table(
        "Decoding",
        [f"{n} of {pixels} px" for pixels in (512, 1024) for n in (1, 4, 16, 32)],
        {
            "pictures": lambda row, _: f"{row['batch']} of {row['pixels']} px",
            "ms": _time,
            "beside the weights": _get("beside_weights_gib"),
        },
    ),
    "denoisers": Table(
        "Denoisers alone, bf16, 1,024 pixels",
        [f"{family}, {n}" for family in ("sdxl", "sd3", "flux") for n in (1, 4)],
        {
            "model, rows": lambda row, _: f"{row['family']}, {row['batch']}",
            "ms": _time,
            "rows per s": _rate("batch"),
            "share": _share,
            "peak": _get("peak_gib"),
        },
    ),
    "small_domains": Table(
        "1,024 samples of the small domains, 50 steps",
        ("layout", "layout, graphs", "molecule", "molecule, graphs"),
        {
            "domain": _get("domain"),
            "ms": _time,
            "samples per s": _rate("samples"),
            "peak": _get("peak_gib"),
        },
    ),
    "workers": Table(
        "A round's collection with JPEG files as reward",
        ("between", "process"),
        {
            "rewards": _get("rewards"),
            "ms": _time,
            "s hidden": _get("reward_hidden_seconds"),
            "s waited": _get("reward_waited_seconds"),
        },
    ),
    "synchronisations": Table(
        "Where a round of DDPO waits for the device",
        ("DDPO",),
        {
            "line": lambda row, _: row.get("line", f"all of a round, {row.get('steps')} steps"),
            "times": _get("number", "d"),
        },
    ),
    "embedded_fit": Table(
        "A fit of the embedded model in bf16-mixed",
        ("p_graft", "ddpo"),
        {
            "algorithm": _get("algorithm"),
            "samples per s": _get("samples_per_second"),
            "rows per s": _get("denoiser_rows_per_second"),
            "share of the stated peak": _get("mfu"),
            "ms to collect a sample": _get("collect_ms_per_sample"),
            "ms to train on it": _get("update_ms_per_sample"),
        },
    ),
    "fits": Table(
        "Two rounds of each kind of algorithm on each embedded model",
        tuple(MODELS),
        {
            "model": _get("model"),
            "precision": _get("precision"),
            "ran": _get("ran"),
            "refused, with a reason": _get("refused"),
            "failed": _get("failed"),
        },
    ),
    "scaling": Table(
        "P-GRAFT on one and on two GPUs",
        ("1", "2"),
        {"devices": _get("devices", "d"), "samples per s": _get("samples_per_second")},
    ),
}


def _pair(row: Row, kind: str) -> str:
    sizes = [row.get(f"{kind}_{side}_peak_gib") for side in ("without", "with")]
    return " / ".join(_number(size) for size in sizes) if None not in sizes else ""


def _official(results: Results) -> float | None:
    """Return the least of our speeds over the official one's, over batch sizes."""
    cell = _beside("sampling", batch=..., arm="official")
    rows = [row for row in results.get("sampling", []) if row["arm"] == "ours"]
    found = [cell(row, results) for row in rows]
    return min(map(float, found)) if found and all(found) else None


def _compiled(results: Results) -> float | None:
    row = _find(results, "sampling", batch=32, arm="ours, compiled")
    return None if row is None else _share_of(row, results)


def _replay(results: Results) -> float | None:
    """Return our best speed over the plain loop of 1 at no more memory."""
    loop = _find(results, "replay", arm="plain loop, 1")
    if loop is None or not loop.get("peak_gib"):
        return None
    own = [
        loop["seconds"] / row["seconds"]
        for row in results["replay"]
        if row["arm"].startswith("ours") and row.get("peak_gib", float("inf")) <= loop["peak_gib"]
    ]
    return max(own, default=None)


def _sdxl(results: Results) -> float | None:
    peaks = [row.get("peak_gib") for row in results.get("sdxl_memory", [])]
    return None if not peaks or None in peaks else max(peak for peak in peaks if peak)


def _scaled(results: Results) -> float | None:
    one, two = (_find(results, "scaling", devices=n) for n in (1, 2))
    rates = [row.get("samples_per_second") if row else None for row in (one, two)]
    return rates[1] / rates[0] if rates[0] and rates[1] else None


_TARGETS: dict[str, tuple[str, Callable[[Results], float | None]]] = {
    "sampling 32 pictures, compiled: share of the matrix product": ("at least 0.5", _compiled),
    "sampling: times the official pipeline's speed, least of all": ("at least 1", _official),
    "DDPO's update: times the plain loop of 1, at no more memory": ("at least 2", _replay),
    "SDXL with a LoRA at 1,024 px: most memory, GiB": ("at most 24", _sdxl),
    "two GPUs: times the samples per s of one": ("at least 1.9", _scaled),
}


def page(folder: Path) -> str:
    """Return the page of all results in a folder; tiny models' are left out."""
    sections = [_HEAD]
    runs = [list(read_lines(path)) for path in sorted(folder.glob("*.jsonl"))]
    runs = [lines for lines in runs if lines and not lines[0].get("tiny")]
    for lines in runs:
        about = {k: v for k, v in lines[0].items() if k not in ("part", "device", "tiny")}
        sections.append(f"## {lines[0]['device']}\n")
        sections.append(", ".join(f"{name} {value}" for name, value in about.items()) + ".\n")
        sections += _sections(_rows(lines))
    if not runs:
        sections.append("## No results yet\n")
        sections += _sections({})
    return "\n".join(sections)


def _rows(lines: Rows) -> Results:
    done = finished(lines)
    found: Results = {part: [] for part in done}
    for line in lines:
        if line["part"] in done and not line.get("finished"):
            found[line["part"]].append(dict(line))
    return found


def _sections(results: Results) -> list[str]:
    head = ["target", "wanted", "reached"]
    rows = []
    for name, (wanted, reach) in _TARGETS.items():
        reached = reach(results)
        rows.append([name, wanted, NOTHING if reached is None else f"{reached:.2f}"])
    made = ["### Targets\n", _markdown(head, rows)]
    for part, table in TABLES.items():
        made += [f"### {table.title}\n", _markdown(list(table.columns), _cells(part, results))]
    return made


def _cells(part: str, results: Results) -> list[list[str]]:
    """Return the cells of a part's table; what could not be measured says why in its second one."""
    table = TABLES[part]
    if part not in results:
        empty = [NOTHING] * (len(table.columns) - 1)
        return [[name, *empty] for name in table.expected]
    cells = []
    for row in results[part]:
        own = [cell(row, results) for cell in table.columns.values()]
        why = "out of memory" if row.get("out_of_memory") else row.get("skipped")
        why = why or row.get("error")
        cells.append(own if why is None else [own[0], why, *[""] * (len(own) - 2)])
    return cells


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
