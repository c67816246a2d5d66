"""How many files a round enters, and how often each: the distance a reader has to walk.

    python benchmarks/files_entered.py

Method: a tiny run of P-GRAFT on the Gaussian mixture (2 conditions x 4 candidates, 4 steps, one
process) is profiled in its first `training_step` and its first `test_step`. Every call of a
function or resumption of a generator counts for the file that defines it; of this project's files
all are printed.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from quiet import quiet_trainer

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.sampling import Sampler

ROOT = Path(__file__).parents[1]
STEPS = ("training_step", "test_step")


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for step, entered in trace().items():
        print(f"{step}: {len(entered)} files, {sum(entered.values())} calls")
        for name, number in entered.most_common():
            print(f"  {number:5d} {name}")


def trace() -> dict[str, Counter[str]]:
    """Run P-GRAFT; return by step how often each of the project's files was entered."""
    sampler = Sampler(num_steps=4, eta=1.0)
    module = PGRAFT(
        GaussianMixturePipeline(),
        Coordinate(),
        sampler=sampler,
        num_candidates=4,
        num_eval_samples=4,
    )
    entered = {step: count_calls(module, step) for step in STEPS}
    data = MixtureData(num_train=2, num_val=2, num_test=2, batch_size=2, eval_batch_size=2)
    trainer = quiet_trainer(
        max_epochs=1, limit_val_batches=0, default_root_dir="runs/files_entered"
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return entered


def count_calls(module: Any, step: str) -> Counter[str]:
    """Profile a method of a module whenever it runs; return the counter that it fills."""
    method, entered = getattr(module, step), Counter[str]()

    def profiled(*args: Any) -> Any:
        with profile(entered):
            return method(*args)

    setattr(module, step, profiled)
    return entered


@contextmanager
def profile(entered: Counter[str]) -> Iterator[None]:
    """Count calls within the block by file."""
    folders = (str(ROOT / "lit_rlft"), str(ROOT / "domains"))

    def look(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            entered[str(Path(frame.f_code.co_filename).relative_to(ROOT))] += 1

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


if __name__ == "__main__":
    main()
