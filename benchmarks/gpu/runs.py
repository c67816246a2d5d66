"""Runs parts and keeps their rows: what is there is skipped, what was interrupted is repeated."""

import json
import platform
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS, Part
from lit_rlft.runs.lines import append_lines, read_lines

__all__ = ["about", "finished", "run"]

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")

Line = Mapping[str, Any]


def about(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: the device, its memory, versions."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "devices": 1}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    found["python"] = platform.python_version()
    return found | {name: metadata.version(name) for name in _PACKAGES}  # type: ignore[no-untyped-call]


def finished(lines: Iterable[Line]) -> set[str]:
    """Return the parts that need not be run again."""
    return {line["part"] for line in lines if line.get("finished")}


def run(
    path: Path, device: torch.device, *, tiny: bool, only: list[str] | None, minutes: float
) -> None:
    """Run the parts that a file of results lacks, and append each when it is done.

    Args:
        path: The file, in JSON lines.
        device: Where to run.
        tiny: Whether to run tiny models, to try the code.
        only: Names of the parts to run; None runs all.
        minutes: For all parts together, shared out by their weights.

    Raises:
        SystemExit: The file is of another device, or of tiny models while these are not.
    """
    lines, here = list(read_lines(path)), {**about(device), "tiny": tiny}
    before = next((line for line in lines if line["part"] == "about"), None)
    if before is None:
        _append(path, [{"part": "about", **here}])
    elif (before["device"], before["tiny"]) != (here["device"], tiny):
        raise SystemExit(
            f"{path} holds results of {before['device']}, tiny: {before['tiny']}; give another "
            f"file for {here['device']}, tiny: {tiny}"
        )
    print(json.dumps(here), flush=True)
    done, whole = finished(lines), sum(part.weight for part in PARTS.values())
    for name, part in PARTS.items():
        if name in done:
            print(f"{name}: is there", flush=True)
        elif only is None or name in only:
            seconds = 60 * minutes * part.weight / whole
            _append(path, _rows(name, part, device, tiny, seconds))


def _rows(
    name: str, part: Part, device: torch.device, tiny: bool, seconds: float
) -> list[dict[str, Any]]:
    """Run a part; return its lines, the last of which says that it is finished."""
    began = time.monotonic()
    bench = Bench(device, tiny, seconds, repeats=2 if tiny else 7)
    part.measure(bench)
    taken = time.monotonic() - began
    for row in bench.rows:
        print(f"{name}: {json.dumps(row)}", flush=True)
    print(f"{name}: {taken:.0f} s of {seconds:.0f}", flush=True)
    rows: list[dict[str, Any]] = [{"part": name, **row} for row in bench.rows]
    return [*rows, {"part": name, "finished": True, "took": round(taken, 1)}]


def _append(path: Path, lines: Iterable[Line]) -> None:
    append_lines(path, "".join(json.dumps(line) + "\n" for line in lines))
