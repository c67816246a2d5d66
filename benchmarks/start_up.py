"""Processor time from the command to the first sample of a fit.

Method: `lit-rlft fit` runs in a process of its own until its denoiser is first called in the first
round, and ends there. Printed are the processor's seconds (user and system, all threads) that had
passed when the trainer was made, when the first round began and at that call: the least of
`--repeats` processes and all of the totals. A busy machine adds to all of them, hence the least.

    python benchmarks/start_up.py --repeats 5
    python benchmarks/start_up.py --config layout --config ddpo
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("trainer made", "first round", "first sample")


def measure(configs: list[str], python: str) -> dict[str, float]:
    """Return the seconds by stage of one process."""
    words = [f"--config={config}" for config in configs]
    words += ["--trainer.accelerator=cpu", "--trainer.callbacks+=start_up.Clock", "--name=run"]
    code = f"from lit_rlft.cli.front import main; main({['fit', *words]!r})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    if not done.stdout.strip():
        raise SystemExit(done.stderr[-3000:])
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="append", help="repeatable; shapes and p_graft if none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="one or several")
    options = parser.parse_args()
    configs = options.config or ["shapes", "p_graft"]
    turns: dict[str, list[dict[str, float]]] = {python: [] for python in options.python}
    for _ in range(options.repeats):
        for python, own in turns.items():  # several take turns, so that all share a busy machine
            own.append(measure(configs, python))
    for python, own in turns.items():
        least = min(own, key=lambda seconds: seconds[STAGES[-1]])
        totals = ", ".join(f"{seconds[STAGES[-1]]:.2f}" for seconds in own)
        print(f"{python}, {' + '.join(configs)}: processor seconds")
        print("\n".join(f"  {stage:14}{least[stage]:7.2f}" for stage in STAGES))
        print(f"  all totals: {totals}")


if __name__ != "__main__":
    from lightning import Callback, LightningModule, Trainer

    class Clock(Callback):
        """Notes the processor's time, and ends the process at the first call of the denoiser."""

        def __init__(self) -> None:
            self.seconds = {"trainer made": time.process_time()}

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            """Wait for the call."""
            self.seconds["first round"] = time.process_time()
            denoiser: Any = pl_module.pipeline.denoiser  # type: ignore[union-attr]
            denoiser.register_forward_pre_hook(self._end)

        def _end(self, *_: Any) -> None:
            print(json.dumps(self.seconds | {"first sample": time.process_time()}), flush=True)
            os._exit(0)


if __name__ == "__main__":
    main()
