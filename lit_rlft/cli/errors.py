"""Errors as sentences, with the keys that a user typed or can type."""

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_rlft.cli.gradients import with_names
from lit_rlft.cli.parsing import is_users, parser_sentence, short, users_line
from lit_rlft.core.checks import NO_SUPER, BadArgument, UsageError
from lit_rlft.loop.differentiable import NoGradient

__all__ = ["own_frames", "sentence"]

_PLAIN = {
    "Architecture": "pipeline.init_args.architecture",
    "FixedPoint": "model.init_args.solver",
    "LoRA": "model.init_args.lora",
    "RewardWorkers": "model.init_args.reward_workers",
    "Sampler": "model.init_args.sampler",
    "SlidingWindow": "model.init_args.sliding",
}
"""Where the settings of classes are that have no class path in a config."""


def sentence(error: Exception, config: Namespace | None = None) -> str | None:
    """Return one sentence for an error that the user can fix, None for any other.

    Parsing wraps errors: the innermost one says what is wrong.

    Args:
        error: What was raised.
        config: Of the command, if it was parsed: an argument is then named by its key there.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, BadArgument) and config is not None:
            return _with_key(cause, config)
        if isinstance(cause, NoGradient):
            return with_names(cause, config)
        if isinstance(cause, UsageError):
            return _in_constructor(cause, config)
        if isinstance(cause, OmegaConfBaseException):
            return _interpolation(cause)
    if isinstance(error, ArgumentError) and config is None:
        return parser_sentence(causes)
    found = _unborn(causes) or _memory(causes) or _uncompiled(causes)
    return found or _unmade(causes, config) or _settings(causes, config)


def _interpolation(error: OmegaConfBaseException) -> str:
    """Return the sentence on a reference ${...} that leads nowhere."""
    problem = str(error).partition("\n")[0]
    key = str(error.full_key or "").partition(".")[2]
    return short(f"{key or 'a config'}: {problem}; refer to a key that has a value", 250)


def _memory(causes: Sequence[BaseException]) -> str | None:
    """Return the sentence on a size for which there is no memory."""
    for cause in causes:
        text = str(cause)
        if isinstance(cause, MemoryError) or re.search(
            "out of memory|can't allocate memory|not enough memory|Storage size calculation", text
        ):
            wanted = re.search(r"[Tt]rie(?:d|s) to allocate ([\d.]+ \w+)", text)
            size = f" (for {wanted.group(1)})" if wanted else ""
            return (
                f"out of memory{size}; lower the sizes, such as data.init_args.batch_size, "
                "model.init_args.num_candidates, sampling_batch_size or microbatch_size; on a GPU "
                "auto finds the last two"
            )
    return None


def _uncompiled(causes: Sequence[BaseException]) -> str | None:
    """Return the sentence on a network that torch could not compile."""
    for cause in causes:
        if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = short(str(cause).partition("\n")[0], 150)
            return (
                f"pipeline.init_args.compile: torch could not compile the denoiser ({why}); set it "
                "to null, or install a C++ compiler and, for a GPU, triton"
            )
    return None


_UNMADE = re.compile(
    r"any of the Union subtypes.*?Errors:\s*- (?:Problem with given class_path '[\w.]+':\s+)*"
    r"(?P<why>[^\n]+).*?class_path='(?P<path>[\w.]+)'",
    re.DOTALL,
)


def _unmade(causes: Sequence[BaseException], config: Namespace | None) -> str | None:
    """Return the sentence on a class that failed to be made, as the parser tells it."""
    for cause in reversed(causes):
        if found := _UNMADE.search(str(cause)):
            name = found["path"].rpartition(".")[2]
            keys = [] if config is None else [k for k, n in _classes(config.as_dict()) if n == name]
            why = users_line(causes[-1]) or short(found["why"], 120)
            nulls = [] if not keys or config is None else _nulls(config, keys[0])
            if nulls and "NoneType" in why:
                why = f"null is no value of {', '.join(nulls)}"
            return f"{keys[0] if keys else name}: {name} cannot be made with these settings ({why})"
    return None


def _nulls(config: Namespace, key: str) -> list[str]:
    """Return the settings of a class that are null."""
    value: Any = config.as_dict()
    for name in key.split("."):  # a class without arguments has no init_args
        value = value[int(name)] if isinstance(value, list) else value.get(name, {})
    return [name for name, own in value.items() if own is None]


_UNBORN = re.compile(
    r"before Module.__init__\(\) call|'(\w+)' object has no attribute "
    r"'(?:_modules|_parameters|_buffers|prepare_data_per_node|_log_hyperparams|automatic_opt\w+|"
    r"_compiler_ctx)'"
)


def _unborn(causes: Sequence[BaseException]) -> str | None:
    """Return the sentence on a class whose `__init__` does not call that of its base."""
    for cause in reversed(causes):
        if isinstance(cause, AttributeError) and (found := _UNBORN.search(str(cause))):
            paths = re.findall(r"given class_path '([\w.]+)'", " ".join(map(str, causes)))
            name = found.group(1) or (paths[-1] if paths else "a class of yours")
            return NO_SUPER.format(name)
    return None


def _settings(causes: Sequence[BaseException], config: Namespace | None) -> str | None:
    """Return the sentence on a setting of the trainer that Lightning refuses."""
    error = causes[0]
    frames = traceback.extract_tb(error.__traceback__)
    misused = isinstance(error, MisconfigurationException)
    # A package is missing, or two settings exclude each other.
    own = any(is_users(frame.filename) for frame in frames)
    misused |= isinstance(error, ImportError | RuntimeError) and _lightnings(frames) and not own
    if not misused and not (isinstance(error, ValueError | TypeError) and _lightnings(frames)):
        return None
    text = short(str(error), 200)
    if "not in bounds" in text:
        return f"seed_everything: {text}"
    if "gpu backend" in text:
        return f"trainer.accelerator: {text} Choose cpu or auto"
    for group in ("trainer", "checkpoint"):
        known = [] if config is None or group not in config else list(config[group].as_dict())
        places = {name: re.search(rf"\b{name}\b", text) for name in known}
        if named := [(found.start(), name) for name, found in places.items() if found]:
            return f"{group}.{min(named)[1]}: {text}"
    return text if text and misused else None


def _lightnings(frames: traceback.StackSummary) -> bool:
    home = Path(lightning.__file__).parent
    return bool(frames) and Path(frames[-1].filename).is_relative_to(home)


def own_frames(error: BaseException) -> str | None:
    """Return what an error of the user's own code came through, and a sentence; None for others.

    The last line is the sentence; above it are the last frames in the user's files.
    """
    while error.__cause__ is not None:  # what the parser wraps
        error = error.__cause__
    own = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    if not own:
        return None
    shown = "".join(traceback.format_list(own[-3:]))
    place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name}"
    return f"{shown}lit-rlft: error: {short(f'{type(error).__name__}: {error}', 180)} ({place})"


def _with_key(error: BadArgument, config: Namespace) -> str:
    """Return an argument's problem under its key, or under its class where it has no key."""
    found = [key for key, name in _classes(config.as_dict()) if name == error.owner]
    prefix = found[0] if found else _PLAIN.get(error.owner)
    return str(error) if prefix is None else f"{prefix}.{error.argument} {error.problem}"


def _in_constructor(error: UsageError, config: Namespace | None) -> str:
    """Return an error's sentence, "<argument>: ...", with the key of a constructor's argument.

    Constructors call functions that know no more than the argument's name, such as readers of
    files; the innermost constructor with such an argument whose class the config names is meant.
    """
    said, found = str(error), None
    argument = said.partition(":")[0]
    places = [] if config is None else list(_classes(config.as_dict()))
    keys = {name: key for key, name in reversed(places)}  # the first of a class, as above
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code, owner = frame.f_code, type(frame.f_locals.get("self")).__name__
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if code.co_name == "__init__" and argument in known and owner in keys:
            found = keys[owner]
    return said if found is None else f"{found}.{said}"


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over the keys of init_args in a config and the names of their classes."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str):
            yield f"{key}.init_args", path.rpartition(".")[2]
    elif not isinstance(value, list):
        return
    parts = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, part in parts:
        yield from _classes(part, f"{key}.{name}" if key else str(name))
