"""What a pipeline's methods answer, checked at each call: a wrong shape would train in silence.

Shapes and types alone are looked at, so that no check waits for a device. A method of its own that
raises an error is left alone: the error says more.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any

from torch import Tensor, int64, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.condition import Condition
from lit_rlft.core.state import State, batch_size, described, leaves

__all__ = ["check_answers", "check_networks", "num_rows"]

Check = Callable[..., str | None]
"""From a pipeline, its method's answer and what the method was given to the problem, if any."""


def check_networks(pipeline: nn.Module) -> None:
    """Raise UsageError unless a pipeline has a denoiser and a process."""
    for name, what in (("denoiser", "the network to train"), ("process", "its noising process")):
        if not hasattr(pipeline, name):
            raise UsageError(
                f"{_name(pipeline)} has no {name}; set self.{name}, {what}, in its __init__"
            )


def check_answers(kind: type) -> None:
    """Check what the methods answer that a class of pipelines defines.

    Args:
        kind: The class; its methods are replaced.
    """
    for name, check in _CHECKS.items():
        if callable(method := vars(kind).get(name)):
            setattr(kind, name, _checked(name, method, check))


def _checked(name: str, method: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Return a method that raises UsageError where `check` finds a problem with its answer."""

    @wraps(method)
    def answer(pipeline: Any, *given: Any, **named: Any) -> Any:
        value = method(pipeline, *given, **named)
        if named:  # in the order in which checks take them
            given = signature(method).bind(pipeline, *given, **named).args[1:]
        if problem := check(pipeline, value, *given):
            raise UsageError(f"{_name(pipeline)}.{name} returned {problem}")
        return value

    return answer


def _condition(pipeline: Any, value: Any, batch: Mapping[str, Any]) -> str | None:
    if not isinstance(value, Condition):
        return f"{described(value)}; it returns a lit_rlft.Condition"
    num, entries, rows = _batch_rows(batch), value.entries, value.rows
    if not isinstance(entries, Sequence) or not all(isinstance(e, Mapping) for e in entries):
        return 'a Condition whose entries are no records; they are dicts, as [{"name": "any"}]'
    if not isinstance(rows, Tensor) or rows.dtype != int64 or rows.dim() != 1:
        return f"a Condition whose rows are {described(rows)}; they are an int64 tensor [B]"
    if num is not None and len(rows) != num:
        return f"a Condition with {len(rows)} rows for a batch of {num}; each row of it has one"
    # Others are not looked into: that would wait for a device.
    if len(rows) and rows.device.type == "cpu" and not 0 <= rows.min() <= rows.max() < len(entries):
        return (
            f"a Condition whose rows run from {rows.min()} to {rows.max()}, but it has "
            f"{len(entries)} entries; rows number the entries from 0"
        )
    return _tables(value)


def _tables(condition: Condition) -> str | None:
    num, null = len(condition.entries), condition.null
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
    if not _is_state(value):
        return f"{described(value)}; a state is a tensor or a dict of tensors, the batch first"
    if problem := pipeline.process.state_problem(value):
        return str(problem)
    sizes = {len(leaf) for leaf in leaves(value)}
    if num is not None and sizes != {num}:
        return f"{described(value)} for {num} samples; each has a row"
    return None


def _prediction(
    pipeline: Any, value: Any, x_t: State, t: Tensor, condition: Condition
) -> str | None:
    if not _is_state(value):
        return f"{described(value)}; a prediction is a tensor or a dict of tensors, as the state is"
    problem: str | None = pipeline.process.prediction_problem(value, x_t)
    return problem


def _samples(pipeline: Any, value: Any, x_0: State, condition: Condition) -> str | None:
    num = batch_size(x_0)
    if value is None:
        return "None; it returns samples, as a tensor [B, ...] or a lit_rlft.core.samples.Samples"
    if num_rows(value) not in (None, num):
        return f"{described(value)} for {num} states; each state is a sample"
    return None


def _pictures(pipeline: Any, value: Any, samples: Any, condition: Condition) -> str | None:
    fits = isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 3
    num = num_rows(samples)
    if fits and value.is_floating_point() and num in (None, len(value)):
        return None
    size = "B" if num is None else num
    return f"{described(value)}; pictures are a tensor [{size}, 3, H, W] of floats in [0, 1]"


_CHECKS: Mapping[str, Check] = {
    "encode": _condition,
    "blank": _blank,
    "states": _states,
    "predict": _prediction,
    "forward": _prediction,
    "decode": _samples,
    "render": _pictures,
}


def _is_state(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(leaf, Tensor) for leaf in value.values())
    return isinstance(value, Tensor) and value.dim() > 0


def _batch_rows(batch: Mapping[str, Any]) -> int | None:
    """Return how many rows a batch has, or None where no column tells."""
    columns = [batch["index"]] if "index" in batch else batch.values()
    return next((num for num in map(num_rows, columns) if num is not None), None)


def num_rows(value: Any) -> int | None:
    """Return how many rows a value has: of a state B; None where it does not tell."""
    if _is_state(value):
        return batch_size(value)
    tells = hasattr(value, "__len__") and not isinstance(value, Mapping | Tensor | str)
    return len(value) if tells else None


def _name(pipeline: object) -> str:
    return type(pipeline).__name__
