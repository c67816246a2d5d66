"""What rewards and metrics answer, checked before it is used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import num_rows

__all__ = [
    "any_finite",
    "apart",
    "device_of",
    "is_number",
    "leads_to",
    "numbers",
    "tensors",
    "unchanged",
]

M = TypeVar("M")


def tensors(samples: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of samples: a tensor, a dataclass, or a list or dict of these."""
    if isinstance(samples, Tensor):
        yield samples
    elif is_dataclass(samples) and not isinstance(samples, type):
        for field in fields(samples):
            yield from tensors(getattr(samples, field.name))
    elif isinstance(samples, Mapping):
        for part in samples.values():
            yield from tensors(part)
    elif isinstance(samples, list | tuple):
        for part in samples:
            yield from tensors(part)


def any_finite(samples: Any) -> bool:
    """Return whether a sample has finite numbers alone; True where samples hold no tensors."""
    rows = [
        one.isfinite().unsqueeze(1).flatten(1).all(dim=1).cpu()
        for one in tensors(samples)
        if one.dim() and one.is_floating_point()
    ]
    sizes = {len(row) for row in rows}
    return len(sizes) != 1 or bool(torch.stack(rows).all(dim=0).any())


def device_of(samples: Any, default: torch.device) -> torch.device:
    """Return where samples are: the device of their first tensor, or the default without any."""
    return next((one.device for one in tensors(samples)), default)


def leads_to(answer: Any, samples: Any) -> bool:
    """Return whether a tensor was computed with gradients, or is one of the samples' own."""
    # Torch says of a view taken without gradients that it requires one.
    own = isinstance(answer, Tensor) and answer.grad_fn is not None
    return own or any(answer is one for one in tensors(samples))


def is_number(value: Any) -> bool:
    """Return whether a value is one number, of Python, torch or numpy."""
    return isinstance(value, SupportsFloat) and num_rows(value) in (None, 1)


def apart(own: Mapping[str, M], others: Mapping[str, M]) -> dict[str, M]:
    """Return measurements under names of their own: "qed_2" where "qed" is measured already.

    Args:
        own: What is measured already, such as the reward and its parts.
        others: What comes besides.
    """
    named: dict[str, M] = {}
    for name, value in others.items():
        numbered = (f"{name}_{number}" for number in count(2))
        free = (one for one in numbered if not (one in own or one in others or one in named))
        named[next(free) if name in own else name] = value
    return named


@contextmanager
def unchanged(samples: Any, name: str) -> Iterator[None]:
    """Within the block a reward or a metric looks at samples.

    Torch counts the changes of a tensor; those of inference mode, which it does not count, are
    compared with a copy. Changes through `.data` or numpy are not seen outside inference mode.

    Args:
        samples: As they were decoded.
        name: Who looks at them.

    Raises:
        UsageError: They were changed in place: others would score something that nobody drew.
    """
    before = [(one, _state(one)) for one in tensors(samples)]
    yield
    if not all(_same(one, state) for one, state in before):
        raise UsageError(
            f"{name} changes the samples in place, but others read them too; begin its method with "
            "samples = samples.clone(), or compute new tensors"
        )


def numbers(name: str, values: Any, num_samples: int, what: str) -> Tensor:
    """Return values as a real floating-point tensor [B]: float64 as it is, all others as float32.

    Args:
        name: Who returned them.
        values: What was returned.
        num_samples: B.
        what: What is returned: "reward" or "metric".

    Raises:
        UsageError: They are no tensor [B], or complex.
    """
    rule = f"a {what} returns a tensor with one number per sample, shape ({num_samples},)"
    if not isinstance(values, Tensor):
        lists = hasattr(values, "__len__")
        remedy = ", as torch.as_tensor makes of lists and arrays" if lists else ""
        raise UsageError(f"{name} returned a {type(values).__name__}; {rule}{remedy}")
    if values.shape != (num_samples,):
        raise UsageError(
            f"{name} returned shape {tuple(values.shape)} for {num_samples} samples; {rule}"
        )
    if values.is_complex():
        raise UsageError(f"{name} returned complex numbers; return their .real or .abs()")
    return values if values.dtype == torch.float64 else values.float()


def _state(tensor: Tensor) -> int | Tensor:
    return tensor.clone() if tensor.is_inference() else tensor._version


def _same(tensor: Tensor, before: int | Tensor) -> bool:
    if isinstance(before, int):
        return tensor._version == before
    if tensor.is_floating_point():  # NaN differs from itself
        return torch.equal(tensor.nan_to_num(), before.nan_to_num())
    return torch.equal(tensor, before)
