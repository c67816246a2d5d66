"""Whether runs can be compared sample by sample, and if not, why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import yaml
from numpy.typing import NDArray

from lit_rlft.core.checks import UsageError, loading
from lit_rlft.report.run import Run, check_domain, settings_that_differ
from lit_rlft.runs.plain import Plain

__all__ = ["Tested", "check_comparable", "same_noise", "same_reward"]

_REASONS = {
    "model.seed": "their samples come from other noise",
    "model.sampler": "their samplers are not the same",
    "model.num_eval_samples": "they drew other numbers of samples",
    "data": "their conditions are not the same",
    "reward": "their rewards are not the same",
    "pipeline": "they started from other models",
}
"""By the settings that must agree: what it means where they do not."""
_FREE = ("batch_size", "num_workers", "compile", "save_dtype")
"""Ends of keys that change no sample of a test."""

_TOLERANCE = 0.01
"""Difference of a sample's reference reward, in standard deviations, that is another sample."""
_OTHERS = 0.05
"""Share of the samples that may differ by more: machines round differently."""


@dataclass(frozen=True)
class Tested:
    """A run, and what its test measured of each sample.

    Attributes:
        run: The run.
        reward: The name of the trained reward.
        keys: Row of the data, number in it and label, of n samples.
        columns: Measurements by "<arm>/<name>", [n].
    """

    run: Run
    reward: str
    keys: Sequence[tuple[int, int, str]]
    columns: dict[str, NDArray[np.float64]]


def check_comparable(runs: Sequence[Run]) -> list[Tested]:
    """Return what the tests of runs measured.

    Raises:
        UsageError: They are fewer than two, or of other domains, data, noise, samplers, rewards or
            pretrained models; or a run's file is missing or damaged.
    """
    if len(runs) < 2:
        raise UsageError("compare needs two runs or more, such as runs/a runs/b")
    check_domain(runs)
    _check_settings([_as_tested(run) for run in runs])
    tested = []
    for run in runs:
        keys, columns = run.table()
        numbers = {name: np.array(values, np.float64) for name, values in columns.items()}
        tested.append(Tested(run, run.reward, keys, numbers))
    for other in tested[1:]:
        _check_samples(tested[0], other)
    return tested


def same_noise(runs: Sequence[Run]) -> bool:
    """Return whether by their settings the runs' samples of a row share condition and noise."""
    return not any(_differing(runs, owner) for owner in _REASONS if owner != "reward")


def same_reward(runs: Sequence[Run]) -> bool:
    """Return whether by their settings the runs were trained on one reward."""
    return not _differing(runs, "reward") and len({run.reward for run in runs}) == 1


def _differing(runs: Sequence[Run], owner: str) -> dict[str, list[Plain]]:
    """Return the settings below a key that differ and that samples depend on."""
    return {
        key: values
        for key, values in settings_that_differ(runs).items()
        if (key == owner or key.startswith(f"{owner}.")) and not key.endswith(_FREE)
    }


def _as_tested(run: Run) -> Run:
    """Return a run with the settings of its test, which may differ from those of its fit."""
    path = run.folder / "config_test.yaml"
    if not path.is_file():
        return run
    with loading(f"{path} is damaged; test the run again"):
        return replace(run, config=dict(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _check_settings(runs: Sequence[Run]) -> None:
    for other in runs[1:]:
        for owner, meaning in _REASONS.items():
            found = [
                f"{key} is {values[0]} in {runs[0].folder} and {values[1]} in {other.folder}"
                for key, values in _differing([runs[0], other], owner).items()
            ]
            if found:
                more = f" (and {len(found) - 1} more)" if found[1:] else ""
                raise UsageError(
                    f"the runs are not comparable: {meaning}: {found[0]}{more}; test both with the "
                    "same settings"
                )


def _check_samples(first: Tested, other: Tested) -> None:
    names = f"{first.run.folder} and {other.run.folder}"
    if list(first.keys) != list(other.keys):
        raise UsageError(
            f"the runs are not comparable: the tests of {names} have other rows or conditions; "
            "test both with the same data"
        )
    column = f"reference/{first.reward}"
    if first.reward != other.reward or not all(column in one.columns for one in (first, other)):
        return
    own, theirs = first.columns[column], other.columns[column]
    scale = _TOLERANCE * max(float(np.nanstd(own)), 1e-12)
    apart = ~((np.abs(own - theirs) <= scale) | (np.isnan(own) & np.isnan(theirs)))
    if apart.mean() > _OTHERS:
        raise UsageError(
            f"the runs are not comparable: {apart.mean():.0%} of the pretrained model's samples "
            f"have other rewards in the tests of {names}, so that they share no noise; test both "
            "with the same model on the same kind of machine"
        )
