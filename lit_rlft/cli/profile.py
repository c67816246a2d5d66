"""`lit-rlft profile`: measures when a reward is decided, and suggests P-GRAFT's cut."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ProgressBar

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli.app import Command, run
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Batch
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.selection import Selection, TopK
from lit_rlft.core.streams import Stream
from lit_rlft.evaluation.reward_profile import Level, Profiled, levels_of, profile, suggested
from lit_rlft.loop.route import Route
from lit_rlft.runs.lines import without_nan

__all__ = ["profile_words"]

_DEFAULTS = {"conditions": 32, "candidates": 8, "completions": 4, "levels": 8}
_FEWEST = {"conditions": 2, "candidates": 2, "completions": 2, "levels": 1}
_MOST_OPEN = 0.25


def profile_words(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: After the name of the command, as `fit` takes them, with files for configs and full
            paths for classes; and --conditions, --candidates, --completions, --levels, --most_open.

    Raises:
        SystemExit: Something is wrong that the user can change; the message is one sentence.
    """
    own = ArgumentParser("lit-rlft profile", add_help=False, allow_abbrev=False)
    for name in (*_DEFAULTS, "most_open"):
        own.add_argument(f"--{name}")  # texts: argparse has sentences of its own for numbers
    given, rest = own.parse_known_args(words)
    sizes = {name: _count(name, getattr(given, name)) for name in _DEFAULTS}
    most_open = _share(given.most_open)

    class ProfileCommand(Command):
        """The command validate on the pretrained model, with a profile in place of its samples."""

        called = (
            "profile [--conditions 32] [--candidates 8] [--completions 4] [--levels 8] "
            "[--most_open 0.25]"
        )
        about = "Measure when the reward is decided between noise and data; suggest P-GRAFT's cut."

        def _run_subcommand(self, subcommand: str) -> None:
            self.model.trainer = self.trainer
            profiler = _Profiler(self.model, **sizes)
            # Others report on an evaluation, and there is none.
            held = self.trainer.callbacks  # type: ignore[attr-defined]
            held[:] = [own for own in held if isinstance(own, ProgressBar)]
            self.trainer.validate(profiler.watched(), self.datamodule, verbose=False)
            profiler.report(self.folder, most_open)

    if any(word.partition("=")[0] == "--ckpt_path" for word in rest):
        raise UsageError("profile looks at the pretrained model; leave out --ckpt_path")
    run(["validate", *rest, "--ckpt_path", "none"], ProfileCommand)


def _count(name: str, text: str | None) -> int:
    least = _FEWEST[name]
    if text is None:
        return _DEFAULTS[name]
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"--{name} must be a whole number of {least} or more, got {text!r}")
    return int(text)


def _share(text: str | None) -> float:
    try:
        value = _MOST_OPEN if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageError(f"--most_open must be a number between 0 and 1, got {text!r}")
    return value


class _Profiler:
    """Profiles conditions as a validation brings them.

    Args:
        tuner: Its reference, sampler, reward and, if it has one, acceptance rule.
        conditions: Conditions in all.
        candidates: M, trajectories per condition.
        completions: R, completions per state.
        levels: Levels along the sampler's grid.
    """

    def __init__(
        self,
        tuner: RewardFineTuner,
        *,
        conditions: int,
        candidates: int,
        completions: int,
        levels: int,
    ) -> None:
        self.tuner, self.conditions = tuner, conditions
        self.candidates, self.completions = candidates, completions
        num_steps = tuner.sampler.num_steps
        self.steps = sorted({i * num_steps // levels for i in range(levels)})
        self.selection: Selection = getattr(tuner, "selection", None) or TopK(1)
        self.parts: list[Profiled] = []

    def watched(self) -> RewardFineTuner:
        """Return the tuner, made to profile where it would validate.

        Raises:
            UsageError: The rule does not fit so many candidates, or there are several processes.
        """
        tuner = self.tuner
        if tuner.trainer.world_size > 1:
            raise UsageError("profile runs on one device; add --trainer.devices 1")
        self.selection.check(self.candidates)
        tuner.validation_step = self.step  # type: ignore[method-assign]
        tuner.on_validation_epoch_start = _nothing  # type: ignore[method-assign]
        tuner.on_validation_epoch_end = _nothing  # type: ignore[method-assign]
        return tuner

    def step(self, batch: Batch, batch_idx: int) -> None:
        """Profile a batch of conditions, as many as are still wanted.

        Raises:
            UsageError: The reference's sampler draws no noise.
        """
        known = sum(len(part.rewards) for part in self.parts)
        wanted = min(len(batch["index"]), self.conditions - known)
        if not wanted:
            return
        tuner, m = self.tuner, self.candidates
        batch = {name: values[:wanted] for name, values in batch.items()}
        condition = tuner.pipeline.encode(batch).repeat(m)
        seeds = tuner.rollouts.seeds(batch, m, Stream.EVALUATE)
        how = (self._route(), condition, seeds, self.steps, self.completions)
        scores, again = profile(tuner.rollouts, *how)
        rewards = scores.rewards.cpu().view(-1, m)
        firsts = range(0, len(seeds), m)
        keys = None if scores.keys is None else [scores.keys[i : i + m] for i in firsts]
        noise = generators([seed_from(seeds[i], Stream.SELECT) for i in firsts])
        weights = self.selection.weights(rewards, keys, noise)
        completions = {k: own.view(-1, m, self.completions) for k, own in again.items()}
        self.parts.append(Profiled(rewards, weights, completions))

    def _route(self) -> Route:
        route = self.tuner.reference_route()
        if route.deterministic:
            raise UsageError(
                "profile completes states with fresh noise, and this sampler draws none; "
                "add --model.sampler.eta 1, or take --config p_graft"
            )
        return route

    def report(self, folder: Path, most_open: float) -> None:
        """Print the profile with the suggested cut, and write both to `profile.json`."""
        whole = Profiled(
            torch.cat([part.rewards for part in self.parts]),
            torch.cat([part.weights for part in self.parts]),
            {k: torch.cat([part.completions[k] for part in self.parts]) for k in self.steps},
        )
        times = self.tuner.pipeline.process.times(self.tuner.sampler.num_steps)
        levels = levels_of(whole, times)
        cut = suggested(levels, most_open)
        written = {
            "reward": self.tuner.reward.name,
            "conditions": len(whole.rewards),
            "candidates": self.candidates,
            "completions": self.completions,
            "variance": float(whole.rewards.double().var(dim=1).mean()),
            "most_open": most_open,
            "suggested_cut": None if cut is None else cut.cut,
            "levels": [level._asdict() for level in levels],
        }
        path = folder / "profile.json"
        path.write_text(json.dumps(without_nan(written), indent=2) + "\n", encoding="utf-8")
        print(_table(levels, cut, most_open))
        print(f"profile: {path}")


def _nothing(*args: Any) -> None:
    """Stand for a hook of an evaluation that is not made."""


_BAR = 24


def _table(levels: Sequence[Level], cut: Level | None, most_open: float) -> str:
    lines = [
        "   f      t   variance of the reward still open            gain that a perfect fit keeps",
    ]
    for level in levels:
        bar = "#" * round(_BAR * min(max(level.open_share, 0), 1))
        lines.append(
            f"{level.cut:4.2f}  {level.time:5.3f}   {level.open_share:5.2f} ± "
            f"{level.open_share_sem:4.2f}  {bar:{_BAR}}   {level.kept:5.2f} ± {level.kept_sem:4.2f}"
        )
    if cut is None:
        lines.append(f"no level has less than {most_open:.0%} open: use GRAFT, --model.cut 0")
    else:
        lines.append(
            f"suggested: --model.cut {cut.cut:.4g}, the noisiest level with at most "
            f"{most_open:.0%} open"
        )
    return "\n".join(lines)
