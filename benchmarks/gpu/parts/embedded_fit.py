"""A fit of the embedded model through the command line, in bf16-mixed."""

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.gpu.bench import Bench, Row
from lit_rlft.cli import main

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Run rounds of P-GRAFT and DDPO on the shapes; report what the last one logs as `time/`."""
    for algorithm in ("p_graft", "ddpo"):
        bench.case({"algorithm": algorithm}, partial(_fit, bench, algorithm))


def _fit(bench: Bench, algorithm: str) -> Row:
    words = [
        "fit",
        "--config=shapes",
        f"--config={algorithm}",
        f"--trainer.accelerator={'gpu' if bench.cuda else 'cpu'}",
        "--trainer.devices=1",
        "--trainer.precision=bf16-mixed",
        f"--trainer.limit_train_batches={bench.pick(3, 1)}",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--name=run",
    ]
    if bench.tiny:
        words += ["--data.batch_size=2", "--model.sampler.num_steps=2"]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            main([*words, f"--root={folder}"])
        return _last(Path(folder) / "run")


def _last(folder: Path) -> Row:
    """Return the last value of each scalar of time in a run's log."""
    found: Row = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("time/"):
                found[tag.removeprefix("time/")] = events.Scalars(tag)[-1].value
    return found
