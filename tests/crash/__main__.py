"""`python -m tests.crash --kills 100`: kill runs at random moments, resume, compare their ends."""

import argparse
import random
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

import torch

import lit_rlft.cli.app  # noqa: F401  (children find it imported)
from tests.crash.harness import (
    ALGORITHMS,
    EVERY_ROUND,
    Case,
    difference,
    fresh,
    random_kill,
    resumed,
    run,
)


def campaign(kills: int, seed: int, processes: list[int]) -> bool:
    """Kill so many runs; print where the kills hit and what differs; return whether none does."""
    choose, hits, same, tries = random.Random(seed), Counter[str](), 0, 0
    cases = [Case(algorithm, number) for number in processes for algorithm in ALGORITHMS]
    with fresh(Path(mkdtemp(prefix="crash-"))):
        lengths = {}
        for case in cases:
            whole = run(case.words(_whole(case), EVERY_ROUND), case.processes)
            assert whole.status == 0, whole.output
            lengths[case] = whole.seconds
        killed = 0
        while killed < kills and tries < 5 * kills:
            tries += 1
            case, name = cases[killed % len(cases)], f"run{tries}"
            kill, minutes = random_kill(choose, lengths[case])
            first = run(case.words(name, minutes), case.processes, kill)
            if first.status == 0:
                continue  # it was over before
            killed += 1
            phase = f"{first.phase} ({kill.event})" if kill.event else first.phase
            last = resumed(case, name, minutes)
            wrong = last.output[-600:] if last.status else ""
            wrong = wrong or difference(Path("runs", _whole(case)), Path("runs", name))
            same += not wrong
            hits[phase] += 1
            print(f"{killed} {case} {kill} {phase} {wrong or 'identical'}", flush=True)
    print(f"{killed} kills, {same} identical ends; hit {dict(hits)}", flush=True)
    return same == killed


def _whole(case: Case) -> str:
    return f"whole-{case.algorithm}-{case.processes}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    raise SystemExit(not campaign(given.kills, given.seed, given.processes))
