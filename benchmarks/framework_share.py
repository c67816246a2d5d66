"""What share of a round's processor time is spent outside networks, rewards and the optimiser.

Method: `lit-rlft fit` runs in this process, on one thread. From the second round on the processor's
time is given to what runs innermost: the denoiser, decoding, the reward, encoding, keys,
backward passes, the optimiser's step; what is left of `training_step` is the framework: sampler,
noise, selection, advantages, logs. Printed is the median round of the share, with quartiles.
A busy machine lengthens all parts alike, so that shares depend little on it.

    python benchmarks/framework_share.py --config gaussian_mixture --config ddpo
    python benchmarks/framework_share.py --config layout --config p_graft --rounds 4
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main as lit_rlft

FRAMEWORK = "framework"


class Clock:
    """Gives the processor's time to the innermost block that runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time goes to a name, without that of timed calls in it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return run

    def _switch(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def watch(tuner: RewardFineTuner, clock: Clock) -> None:
    """Have the clock see what is not the framework."""
    pipeline: Any = tuner.pipeline
    pipeline.denoiser.forward = clock.timed("denoiser", pipeline.denoiser.forward)
    for name in ("decode", "encode", "keys"):
        setattr(pipeline, name, clock.timed(name, getattr(pipeline, name)))
    reward: Any = tuner.reward
    reward.forward = clock.timed("reward", reward.forward)
    module: Any = tuner
    module.manual_backward = clock.timed("backward", tuner.manual_backward)
    optimizer: Any = tuner.trainer.optimizers[0]
    optimizer.step = clock.timed("optimiser", optimizer.step)


def measure(words: list[str]) -> list[dict[str, float]]:
    """Run a fit; return the seconds of each round but the first, by name."""
    clock, rounds = Clock(), list[dict[str, float]]()
    step = RewardFineTuner.training_step
    timed = clock.timed(FRAMEWORK, step)

    def training_step(self: RewardFineTuner, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            step(self, batch, batch_idx)
            watch(self, clock)
            return
        clock.seconds.clear()
        timed(self, batch, batch_idx)
        rounds.append(dict(clock.seconds))

    RewardFineTuner.training_step = training_step  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            lit_rlft(words)
    finally:
        RewardFineTuner.training_step = step  # type: ignore[method-assign]
    return rounds


def main() -> None:
    """Print the shares of the median round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="repeatable")
    parser.add_argument("--rounds", type=int, default=7, help="the first one warms up")
    options, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", *(f"--config={config}" for config in options.config), f"--root={folder}"]
        words += ["--trainer.accelerator=cpu", f"--trainer.limit_train_batches={options.rounds}"]
        words += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
        rounds = measure([*words, "--name=run", *rest])
    shares = [seconds[FRAMEWORK] / sum(seconds.values()) for seconds in rounds]
    low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
    print(f"{' + '.join(options.config)}: framework {middle:.0%} ({low:.0%}-{high:.0%})")
    names = sorted({name for seconds in rounds for name in seconds})
    medians = {
        name: statistics.median(seconds.get(name, 0.0) for seconds in rounds) for name in names
    }
    for name, seconds in sorted(medians.items(), key=lambda entry: -entry[1]):
        print(f"  {name:10}{1000 * seconds:9.1f} ms of the processor")


if __name__ == "__main__":
    main()
