"""Wall time of a round whose rewards are scored in side processes, beside that of sampling alone.

Two rewards each sleep half as long per sample as sampling takes, which is measured first: in one
process they double a round. Rounds are those of P-GRAFT on the Gaussian mixture, whose denoiser
sleeps too, so that the machine's cores do not matter: nothing is computed by anybody at the same
time, and what is measured is the cost of handing samples over and of waiting for the last chunk.
Three arms are run in turn, `--repeats` times, so that a busy machine is busy for all:

- alone: the rewards cost nothing;
- between: the rewards sleep in this process, after the samples are drawn;
- beside: the same rewards, each in a process of its own (`reward_workers`).

A repeat is `collect` of one round with its workers ready. Printed are medians, the ratios to
"alone" of each repeat with their range, and whether all arms accept the same samples. The second
table has the same of an evaluation: two batches, each of the tuned model and of the reference.

    python benchmarks/reward_workers.py --samples 256 --chunk 16 --seconds 4 --repeats 5
"""

import argparse
import logging
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from quiet import quiet_trainer
from slow_reward import SlowCoordinate
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State
from lit_rlft.loop.side.rewards import RewardWorkers, side_rewards

NUM_STEPS, NUM_CANDIDATES = 10, 4


class SlowMixture(GaussianMixturePipeline):
    """The mixture, with a denoiser that takes its time."""

    seconds_per_row = 0.0

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> State:
        time.sleep(len(condition) * self.seconds_per_row)
        return super().forward(x_t, t, condition)


def tuner_of(args: argparse.Namespace, seconds: float, workers: RewardWorkers | None) -> PGRAFT:
    """Return a tuner whose two rewards sleep `seconds` each for all samples of a round."""
    torch.manual_seed(0)
    pipeline = SlowMixture()
    pipeline.seconds_per_row = args.seconds / (args.samples * NUM_STEPS)
    parts: dict[str, Reward] = {
        name: SlowCoordinate(axis, seconds / args.samples) for axis, name in enumerate("ab")
    }
    tuner = PGRAFT(
        pipeline,
        WeightedSum(parts),
        sampler=Sampler(NUM_STEPS),
        num_candidates=NUM_CANDIDATES,
        sampling_batch_size=args.chunk,
        reward_workers=workers,
    )
    tuner.trainer = quiet_trainer()
    tuner.setup("fit")
    return tuner


def timed(tuner: PGRAFT, batch: Batch) -> tuple[float, Tensor]:
    """Return the seconds of one collect, and the samples that it accepted."""
    tuner.num_rounds = 0
    start = time.perf_counter()
    with torch.no_grad():
        experience = tuner.collect(batch, tuner.pipeline.encode(batch))
    taken = time.perf_counter() - start
    accepted = experience.states["x_s"]
    assert isinstance(accepted, Tensor)
    return taken, accepted


def evaluated(tuner: PGRAFT, batch: Batch) -> float:
    """Return the seconds of an evaluation of two batches."""
    start = time.perf_counter()
    tuner.evaluator.start()
    with torch.no_grad():
        for i in range(2):
            tuner.evaluator.run(batch, i, tuner.route(), tuner.reference_route())
    assert tuner.evaluator.measurements.tuned.has(1)
    return time.perf_counter() - start


def show(seconds: Mapping[str, Sequence[float]]) -> None:
    """Print the seconds of each arm, and their ratios to "alone"."""
    print(f"{'arm':10}{'seconds':>9}{'of alone':>10}  range")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["alone"], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:10}{statistics.median(own):9.3f}{statistics.median(ratios):10.3f}  {spread}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=256, help="of a round")
    parser.add_argument("--chunk", type=int, default=16, help="samples drawn at a time")
    parser.add_argument("--seconds", type=float, default=4.0, help="that sampling sleeps a round")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batch = {"index": torch.arange(args.samples // NUM_CANDIDATES)}
    alone = tuner_of(args, 0.0, None)
    sampling = timed(alone, batch)[0]
    arms = {
        "alone": alone,
        "between": tuner_of(args, sampling / 2, None),
        "beside": tuner_of(args, sampling / 2, RewardWorkers()),
    }
    accepted = {name: timed(arm, batch)[1] for name, arm in arms.items()}  # workers are ready now
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeats):
        for name, arm in arms.items():
            seconds[name].append(timed(arm, batch)[0])
    show(seconds)
    sides = side_rewards(arms["beside"].reward)
    rounds = args.repeats + 1
    busy, waited = (sum(getattr(s.times, n) for s in sides) / rounds for n in ("busy", "waited"))
    print(f"of {busy:.2f} s of rewards a round, beside waits for {waited:.2f} s")
    same = torch.equal(accepted["between"], accepted["beside"])
    print(f"between and beside accept the same samples: {same}")
    show({name: [evaluated(arm, batch) for _ in range(args.repeats)] for name, arm in arms.items()})
    for side in sides:
        side.stop()


if __name__ == "__main__":
    main()
