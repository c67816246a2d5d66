"""What the page draws by itself: curves, checkpoints with their samples, extremes, fronts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lit_rlft.report.comparable import same_noise
from lit_rlft.report.curves import AXES, Curves
from lit_rlft.report.pareto import WORTH, front
from lit_rlft.report.run import Run

__all__ = ["COLORS", "payload"]

COLORS = ("#2f5fa8", "#d1731d", "#2a8a57", "#a13fa8", "#b3261e", "#5c5c5c", "#0f8b96", "#8a6d1f")
"""Of runs, in order; used again where there are more."""

_BUDGET = 11_000_000
"""Bytes of the drawn part; checkpoints, then samples, are left out until it is met."""
_MOST_POINTS = 600
"""Points of a curve."""
_ARMS = {"train": "training", "val": "tuned", "val_reference": "reference"}
_WATCHED = ("kl", "diversity", "ratio", "clip", "entropy")
"""Words in the names of charts that are shown at once, beside the validations' and the reward's."""
_MAIN = ("reward", *_WATCHED)
_OTHER_AXIS = "_by_"
"""In names of curves that TensorBoard shows over something else than steps."""

Payload = dict[str, Any]


def payload(runs: Sequence[Run]) -> Payload:
    """Return all that the page draws, small enough for a file that people send to each other."""
    found: Payload = {
        "runs": [
            {"name": run.name, "color": COLORS[i % len(COLORS)], "reward": run.reward}
            for i, run in enumerate(runs)
        ],
        "charts": _charts(runs),
        "axes": _axes(runs),
        "checkpoints": _checkpoints(runs),
        "hacking": _hacking(runs),
        "extremes": [
            {"run": i, "entries": run.extremes} for i, run in enumerate(runs) if run.extremes
        ],
    }
    return _fitting(found)


def _charts(runs: Sequence[Run]) -> list[Payload]:
    """Return a chart of each number that was logged, the reward's and the held-out ones first."""
    charts: dict[str, Payload] = {}
    titles = _reward_titles(runs)
    for i, run in enumerate(runs):
        for tag, points in run.curves.points.items():
            group, _, name = tag.partition("/")
            if group not in _ARMS or _OTHER_AXIS in name:
                continue
            is_reward = tag == "train/reward" or (name == run.reward and group != "train")
            title = titles[i] if is_reward else name
            chart = charts.setdefault(title, {"title": title, "series": []})
            chart["series"].append(_series(run.curves, points, i, _ARMS[group]))
    for title, chart in charts.items():
        validated = any(one["arm"] == "tuned" for one in chart["series"])
        chart["main"] = validated or title in titles or any(word in title for word in _WATCHED)
    return sorted(
        charts.values(), key=lambda chart: (not chart["main"], _place(chart["title"], titles))
    )


def _reward_titles(runs: Sequence[Run]) -> list[str]:
    """Return the title of each run's chart of its reward: rewards of other names are kept apart."""
    if len({run.reward for run in runs}) == 1:
        return ["reward"] * len(runs)
    return [run.reward or "reward" for run in runs]


def _place(title: str, rewards: Sequence[str]) -> tuple[int, bool, str]:
    """Sort charts by the first word that their name has, rewards first; the word alone is first."""
    found = (i for i, word in enumerate(_MAIN) if word in title)
    place = 0 if title in rewards else next(found, len(_MAIN))
    return place, title not in (*_MAIN, *rewards), title


def _series(curves: Curves, points: Sequence[tuple[int, float]], run: int, arm: str) -> Payload:
    stride = -(-len(points) // _MOST_POINTS)
    kept = [*points[:-1:stride], points[-1]]
    steps = [step for step, _ in kept]
    axes = {axis: curves.over(axis, steps) for axis in AXES}
    return {"run": run, "arm": arm, "y": [value for _, value in kept], **axes}


def _axes(runs: Sequence[Run]) -> list[str]:
    """Return what curves can be shown over, first what grew in every run that logged it.

    Some runs call no reward in training: over its calls all their points would be one.
    """
    logged = {
        axis: [run.curves.points[tag] for run in runs if tag in run.curves.points]
        for axis, tag in AXES.items()
    }
    still = {
        axis: any(p[-1][1] <= (p[0][1] if len(p) > 1 else 0) for p in found)
        for axis, found in logged.items()
    }
    return sorted((axis for axis in AXES if logged[axis]), key=lambda axis: still[axis])


def _checkpoints(runs: Sequence[Run]) -> Payload | None:
    """Return the samples of validations that all runs have, by run and checkpoint."""
    with_samples = [(i, run) for i, run in enumerate(runs) if _with_entries(run)]
    if not with_samples:
        return None
    if not same_noise([run for _, run in with_samples]):
        with_samples = with_samples[:1]
    common = [
        {_key(entry): entry for entry in _with_entries(run)[-1]["entries"]}
        for _, run in with_samples
    ]
    keys = [key for key in common[0] if all(key in own for own in common)]
    if not keys:
        return None
    found = [{"run": i, **_records(run, keys)} for i, run in with_samples]
    _place_records([run["records"] for run in found])
    places = sorted({0, *(record["at"] for run in found for record in run["records"])})
    head = [{name: common[0][key][name] for name in ("row", "sample", "label")} for key in keys]
    return {"places": places, "keys": head, "runs": found}


def _records(run: Run, keys: Sequence[tuple[Any, ...]]) -> Payload:
    records = []
    for record in _with_entries(run):
        own = {_key(entry): entry for entry in record["entries"]}
        if all(key in own for key in keys):
            mean = record["summary"]["tuned"].get(record["reward"], {}).get("mean")
            tuned = [own[key]["tuned"] for key in keys]
            counts = {name: record[name] for name in ("updates", "reward_calls")}
            records.append({**counts, "mean": mean, "tuned": tuned})
            reference = [own[key]["reference"] for key in keys]
    return {"reference": reference, "records": records}


def _place_records(runs: Sequence[Sequence[Payload]]) -> None:
    """Say where each record stands: by reward calls, or by updates where a run's do not grow."""
    by_calls = True
    for records in runs:
        calls = [0, *(one["reward_calls"] for one in records if one["updates"])]
        by_calls &= all(a < b for a, b in pairwise(calls))
    for record in (record for records in runs for record in records):
        record["at"] = record["reward_calls" if by_calls else "updates"]


def _with_entries(run: Run) -> list[Payload]:
    return [record for record in run.checkpoints if record["entries"]]


def _key(entry: Payload) -> tuple[Any, ...]:
    return entry["row"], entry["sample"], entry["label"]


def _hacking(runs: Sequence[Run]) -> Payload:
    """Return by title the gain of a held-out measurement beside the trained reward's.

    Runs of other rewards have charts of their own: the gains of two rewards share no axis.
    """
    found: Payload = {}
    rewards = dict.fromkeys(run.reward for run in runs)
    for reward in rewards:
        own = [(i, run) for i, run in enumerate(runs) if run.reward == reward]
        for chart in _hacking_of(own, reward):
            told = f" (trained on {reward})" if len(rewards) > 1 else ""
            found[f"{chart['name']}{told}"] = chart
    return found


def _hacking_of(runs: Sequence[tuple[int, Run]], reward: str) -> Iterator[Payload]:
    """Iterate over the charts of runs that were trained on one reward, signs first."""
    signs = [name for _, run in runs for name in run.metrics.get("exploitation") or []]
    records = [record for _, run in runs for record in run.checkpoints]
    guards = {name: worse for one in records for name, worse in one["guards"].items()}
    order = sorted(guards, key=lambda name: (name not in signs, list(guards).index(name)))
    for name in [*order, *(["kl"] if guards else [])]:
        worse = guards.get(name, "higher")
        series = [_gains(i, run, name, worse) for i, run in runs]
        known = [one for one in series if one["x"]]
        if known:
            yield {"name": name, "reward": reward, "worse": worse, "series": known}


def _gains(number: int, run: Run, name: str, worse: str) -> Payload:
    """Return the gains of a run's checkpoints, the reference's 0 before all."""
    points = []
    for record in run.checkpoints:
        gain = record["summary"].get("gain", {})
        pair = [gain.get(one, {}) for one in (record["reward"], name)]
        if all(one.get("mean") is not None for one in pair):
            points.append((record["updates"], *pair))
    if not points:
        return {"run": number, "x": []}
    zero = {"mean": 0.0, "sem": 0.0}
    points = [(0, zero, zero), *points]
    x, y = [p[1]["mean"] for p in points], [p[2]["mean"] for p in points]
    return {
        "run": number,
        "updates": [p[0] for p in points],
        "x": x,
        "y": y,
        "x_sem": [p[1].get("sem") for p in points],
        "y_sem": [p[2].get("sem") for p in points],
        "front": front(list(zip(x, map(WORTH[worse], y), strict=True))),
    }


def _fitting(found: Payload) -> Payload:
    """Leave out checkpoints, then samples, until the payload is within its budget."""
    steps: list[Callable[[Payload], bool]] = [_fewer_checkpoints, _fewer_samples, _fewer_extremes]
    while steps and _size(found) > _BUDGET:
        if not steps[0](found):
            steps.pop(0)
    return found


def _size(found: Mapping[str, Any]) -> int:
    return len(json.dumps(found))


def _fewer_checkpoints(found: Payload) -> bool:
    """Leave out every second checkpoint between the first and the last; False if there is none."""
    shown = found["checkpoints"]
    left = False
    for run in shown["runs"] if shown else []:
        records = run["records"]
        if len(records) > 2:
            run["records"] = [*records[:-1:2], records[-1]]
            left = True
    if left:
        shown["places"] = sorted({0, *(r["at"] for run in shown["runs"] for r in run["records"])})
    return left


def _fewer_samples(found: Payload) -> bool:
    """Leave out the second half of the samples of validations; False where few are left."""
    shown = found["checkpoints"]
    if not shown or len(shown["keys"]) <= 4:
        return False
    half = len(shown["keys"]) // 2
    shown["keys"] = shown["keys"][:half]
    for run in shown["runs"]:
        run["reference"] = run["reference"][:half]
        for record in run["records"]:
            record["tuned"] = record["tuned"][:half]
    return True


def _fewer_extremes(found: Payload) -> bool:
    """Leave out every second extreme sample; False where few are left."""
    left = False
    for run in found["extremes"]:
        if len(run["entries"]) > 3:
            run["entries"], left = run["entries"][::2], True
    return left
