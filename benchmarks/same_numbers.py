"""Whether every algorithm still gives the same numbers on the Gaussian mixture, to the last digit.

    python benchmarks/same_numbers.py before.json         # at one commit
    python benchmarks/same_numbers.py after.json before.json   # at another one, on one machine

Method: each config of `configs/algorithms` trains a few small rounds on the Gaussian mixture in a
process of its own, on one thread, and is tested; metrics.json but for seconds and memory is kept,
and the digest of the trained weights. Two such files are compared entry by entry.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "peak_memory_bytes")
SMALL = {
    "trainer.limit_train_batches": 2,
    "trainer.val_check_interval": 2,
    "trainer.enable_progress_bar": "false",
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "data.init_args.num_train": 64,
    "data.init_args.num_val": 16,
    "data.init_args.num_test": 32,
    "data.init_args.batch_size": 16,
    "data.init_args.eval_batch_size": 16,
    "model.init_args.num_eval_samples": 2,
    "model.init_args.best_of": 2,
    "model.init_args.sampling_batch_size": 24,
    "model.init_args.microbatch_size": 7,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="where the numbers are written")
    parser.add_argument("before", type=Path, nargs="?", help="numbers to compare with")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = sorted(path.stem for path in (ROOT / "configs" / "algorithms").glob("*.yaml"))
    with ThreadPoolExecutor(options.workers) as pool:
        numbers = dict(zip(names, pool.map(measure, names), strict=True))
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    if options.before is None:
        return
    before = json.loads(options.before.read_text())
    wrong = [line for name in names for line in differences(before.get(name), numbers[name], name)]
    print("\n".join(wrong) or f"{len(names)} algorithms: the same to the last digit")
    raise SystemExit(bool(wrong))


def measure(name: str) -> dict[str, Any]:
    """Train and test one algorithm in a folder of its own."""
    configs = ["configs/domains/gaussian_mixture.yaml", f"configs/algorithms/{name}.yaml"]
    words = [f"--config={ROOT / config}" for config in configs]
    words += [f"--{key}={value}" for key, value in SMALL.items()]
    with tempfile.TemporaryDirectory() as folder:
        last = f"{folder}/runs/run/checkpoints/last.ckpt"
        words += [f"--root={folder}/runs", "--name=run"]
        for stage, more in (("fit", []), ("test", [f"--ckpt_path={last}"])):
            code = "import sys; from lit_rlft.cli import main; main(sys.argv[1:])"
            command = [sys.executable, "-c", code, stage, *words, *more]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        report = json.loads(Path(f"{folder}/runs/run/metrics.json").read_text())
        trained = torch.load(last, weights_only=True)["state_dict"]
    digest = hashlib.blake2b(digest_size=16)
    for value in trained.values():
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return {"weights": digest.hexdigest(), **without_times(report)}


def without_times(value: Any) -> Any:
    """Return a tree of dicts without what a clock or the machine's memory decides."""
    if not isinstance(value, dict):
        return value
    return {
        key: without_times(part)
        for key, part in value.items()
        if not any(word in key for word in TIMES)
    }


def differences(before: Any, after: Any, name: str) -> list[str]:
    """Return a line for every entry that is not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        parts = (differences(before.get(k), after.get(k), f"{name}.{k}") for k in keys)
        return [line for part in parts for line in part]
    return [] if before == after else [f"{name}: {before} -> {after}"]


if __name__ == "__main__":
    main()
