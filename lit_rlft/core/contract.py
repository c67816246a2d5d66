"""What a part's methods take, and what a pipeline's answer at each call.

A wrong shape would train in silence.

Shapes and types alone are looked at, so that no check waits for a device. A method of its own that
raises an error is left alone: the error says more.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import getattr_static, isfunction, signature
from typing import Any

from torch import Tensor, int64, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.condition import Condition
from lit_rlft.core.process import Process
from lit_rlft.core.state import State, batch_size, described, is_state, leaves, num_rows

__all__ = ["check_answers", "check_networks", "check_signatures"]

Check = Callable[[Any, Any, Any], str | None]
"""From a pipeline, its method's answer and the method's first argument to the problem, if any."""


def check_networks(pipeline: nn.Module) -> None:
    """Raise UsageError unless a pipeline has a denoiser and a process."""
    parts: dict[str, tuple[str, type]] = {
        "denoiser": ("the network to train", nn.Module),
        "process": ("its noising process", Process),
    }
    for name, (what, kind) in parts.items():
        if not hasattr(pipeline, name):
            raise UsageError(
                f"{_name(pipeline)} has no {name}; set self.{name}, {what}, in its __init__"
            )
        if not isinstance(own := getattr(pipeline, name), kind):
            raise UsageError(
                f"the {name} of {_name(pipeline)} is {described(own)}; it is a {kind.__name__}"
            )


def check_signatures(part: object, *bases: type) -> None:
    """Raise UsageError for a method of a part that cannot be called as the base's can.

    Args:
        part: Of a subclass of the user's own.
        bases: Whose methods' arguments without defaults are handed over by position. Those that
            are no bases of the part are passed over.
    """
    for base in bases:
        if not isinstance(part, base):
            continue
        for name, method in vars(base).items():
            own = getattr(type(part), name)
            if isfunction(method) and isfunction(own) and own is not method and name[0] != "_":
                _check_call(type(part).__name__, name, own, method)


def _check_call(kind: str, name: str, own: Callable[..., Any], base: Callable[..., Any]) -> None:
    taken = signature(base).parameters.values()
    required = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    try:
        signature(own).bind(*required)
    except TypeError as error:
        wanted = ", ".join(required)
        raise UsageError(f"{kind}.{name} must take ({wanted}); as it is: {error}") from error


def check_answers(kind: type, base: type) -> None:
    """Check what the methods answer that a class of pipelines defines or has from a mixin.

    Args:
        kind: The class; its methods are replaced, but for static ones and others that are no plain
            functions.
        base: Its base, whose own methods are right.
    """
    for name, (first, check) in _CHECKS.items():
        method = getattr_static(kind, name, None)
        known = method is getattr_static(base, name, None) or hasattr(method, "answers_checked")
        if isfunction(method) and not known:
            setattr(kind, name, _checked(name, method, first, check))


def _checked(name: str, method: Callable[..., Any], first: str, check: Check) -> Callable[..., Any]:
    """Return a method that raises UsageError where `check` finds a problem with its answer.

    What a subclass asks of `super()` is its own affair: the answer that comes out is checked.
    """
    names = {*list(signature(method).parameters)[1:2], first}

    @wraps(method)
    def answer(pipeline: Any, *given: Any, **named: Any) -> Any:
        value = method(pipeline, *given, **named)
        if getattr(type(pipeline), name, None) is answer:
            known = [*given[:1], *(named[own] for own in names & named.keys())]
            if known and (problem := check(pipeline, value, known[0])):
                raise UsageError(f"{_name(pipeline)}.{name} returned {problem}")
        return value

    answer.answers_checked = True  # type: ignore[attr-defined]
    return answer


def _condition(pipeline: Any, value: Any, batch: Mapping[str, Any]) -> str | None:
    if not isinstance(value, Condition):
        return f"{described(value)}; it returns a lit_rlft.Condition"
    num, entries, rows = _batch_rows(batch), value.entries, value.rows
    held = hasattr(entries, "__len__") and hasattr(entries, "__getitem__")
    if not held or isinstance(entries, Mapping) or not all(isinstance(e, Mapping) for e in entries):
        return 'a Condition whose entries are no records; they are dicts, as [{"name": "any"}]'
    if not isinstance(rows, Tensor) or rows.dtype != int64 or rows.dim() != 1:
        return f"a Condition whose rows are {described(rows)}; they are an int64 tensor [B]"
    if num is not None and len(rows) != num:
        return f"a Condition with {len(rows)} rows for a batch of {num}; each row of it has one"
    # Others are not looked into: that would wait for a device, and rehearsals have no numbers.
    if len(rows) and type(rows) is Tensor and rows.device.type == "cpu":
        first, last = int(rows.min()), int(rows.max())
        if not 0 <= first <= last < len(entries):
            return (
                f"a Condition whose rows run from {first} to {last}, but it has {len(entries)} "
                "entries; rows number the entries from 0"
            )
    return _tables(value)


def _tables(condition: Condition) -> str | None:
    num, null = len(condition.entries), condition.null
    if not isinstance(condition.tables, Mapping):
        return f"a Condition whose tables are {described(condition.tables)}; they are a dict"
    for name, table in condition.tables.items():
        size = num_rows(table) if isinstance(table, Tensor) else None
        if size is None or size < max(num, 0 if null is None else null + 1):
            also = "" if null is None else " and the null condition"
            return (
                f"a Condition whose table {name!r} is {described(table)}; it is a tensor with a "
                f"row for each of {num} entries{also}"
            )
    return None


def _blank(pipeline: Any, value: Any, condition: Condition) -> str | None:
    return _state(pipeline, value, len(condition))


def _states(pipeline: Any, value: Any, batch: Mapping[str, Any]) -> str | None:
    return _state(pipeline, value, _batch_rows(batch))


def _state(pipeline: Any, value: Any, num: int | None) -> str | None:
    if not is_state(value):
        return f"{described(value)}; a state is a tensor or a dict of tensors, the batch first"
    process = getattr(pipeline, "process", None)  # asked within __init__ there may be none yet
    if process is not None and (problem := process.state_problem(value)):
        return str(problem)
    sizes = {len(leaf) for leaf in leaves(value)}
    if num is not None and sizes != {num}:
        return f"{described(value)} for {num} samples; each has a row"
    return None


def _prediction(pipeline: Any, value: Any, x_t: State) -> str | None:
    if not is_state(value):
        return f"{described(value)}; a prediction is a tensor or a dict of tensors, as the state is"
    problem: str | None = pipeline.process.prediction_problem(value, x_t)
    return problem


def _samples(pipeline: Any, value: Any, x_0: State) -> str | None:
    num = batch_size(x_0)
    if value is None:
        return "None; it returns samples, as a tensor [B, ...] or a lit_rlft.core.samples.Samples"
    if num_rows(value) not in (None, num):
        return f"{described(value)} for {num} states; each state is a sample"
    return None


def _pictures(pipeline: Any, value: Any, samples: Any) -> str | None:
    fits = isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 3
    num = num_rows(samples)
    if fits and value.is_floating_point() and num in (None, len(value)):
        return None
    size = "B" if num is None else num
    return f"{described(value)}; pictures are a tensor [{size}, 3, H, W] of floats in [0, 1]"


def _keys(pipeline: Any, value: Any, samples: Any) -> str | None:
    if value is None:
        return None
    num, own = num_rows(samples), num_rows(value)
    if isinstance(value, Tensor) or (num is not None and own not in (None, num)):
        return f"{described(value)}; it returns a list with a key for each sample, or None"
    return None


def _features(pipeline: Any, value: Any, condition: Condition) -> str | None:
    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == len(condition):
        return None
    return f"{described(value)}; features are a tensor [{len(condition)}, F]"


def _tokens(pipeline: Any, value: Any, condition: Condition) -> str | None:
    if isinstance(value, Tensor) and value.dim() == 3 and len(value) == len(condition):
        return None
    return f"{described(value)}; tokens are a tensor [{len(condition)}, L, F]"


_CHECKS: Mapping[str, tuple[str, Check]] = {
    "encode": ("batch", _condition),
    "blank": ("condition", _blank),
    "states": ("batch", _states),
    "predict": ("x_t", _prediction),
    "forward": ("x_t", _prediction),
    "decode": ("x_0", _samples),
    "render": ("samples", _pictures),
    "keys": ("samples", _keys),
    "features": ("condition", _features),
    "tokens": ("condition", _tokens),
}
"""The check of each method, and the name of the argument that it needs."""


def _batch_rows(batch: Mapping[str, Any]) -> int | None:
    """Return how many rows a batch has, or None where no column tells."""
    if not isinstance(batch, Mapping):
        return num_rows(batch)
    columns = [batch["index"]] if "index" in batch else batch.values()
    sizes = {num for num in map(num_rows, columns) if num is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _name(pipeline: object) -> str:
    return type(pipeline).__name__
