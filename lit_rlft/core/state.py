"""States: a tensor or a dict of tensors, every leaf with the batch on dimension 0.

Algorithms treat a state as opaque and only use the functions of this module; a `Process` does the
arithmetic on states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "State",
    "batch_size",
    "cat",
    "described",
    "detach",
    "expand_as",
    "fields_of",
    "flatten",
    "index",
    "is_state",
    "leaves",
    "num_rows",
    "repeat",
    "slices",
    "split",
    "tensor_of",
    "to",
    "tree_map",
    "unflatten",
]

State = Tensor | dict[str, Tensor]


def tree_map(function: Callable[..., Tensor], *states: State) -> State:
    """Apply `function` leaf by leaf; fields of a dict are visited in sorted order."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    return {
        name: function(*(state[name] for state in states if isinstance(state, dict)))
        for name in sorted(first)
    }


def leaves(state: State) -> list[Tensor]:
    """Return the tensors of a state, fields in sorted order."""
    return [state] if isinstance(state, Tensor) else [state[name] for name in sorted(state)]


def batch_size(state: State) -> int:
    """Return B, the common size of dimension 0."""
    return leaves(state)[0].shape[0]


def index(state: State, rows: Tensor | slice) -> State:
    """Select rows of the batch."""
    return tree_map(lambda leaf: leaf[rows], state)


def cat(states: Sequence[State]) -> State:
    """Concatenate states along the batch."""
    return tree_map(lambda *parts: torch.cat(parts), *states)


def flatten(state: State) -> Tensor:
    """Return every sample as a vector, [B, d], fields in sorted order."""
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in leaves(state)], dim=1)


def unflatten(vectors: Tensor, like: State) -> State:
    """Undo `flatten` for samples of the shapes and types of `like`, any number of them."""
    sizes = [leaf[0].numel() for leaf in leaves(like)]
    parts = iter(vectors.split(sizes, dim=1))  # type: ignore[no-untyped-call]
    return tree_map(lambda leaf: next(parts).reshape(-1, *leaf.shape[1:]).to(leaf.dtype), like)


def detach(state: State) -> State:
    """Cut a state off the graph that made it."""
    return tree_map(Tensor.detach, state)


def repeat(state: State, times: int) -> State:
    """Repeat every row `times` times, copies side by side: [B, ...] -> [B * times, ...]."""
    return tree_map(lambda leaf: leaf.repeat_interleave(times, dim=0), state)


def to(state: State, device: torch.device | str) -> State:
    """Move every leaf to a device."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True), state)


def split(state: State, size: int) -> Iterator[State]:
    """Iterate over consecutive chunks of at most `size` rows."""
    for rows in slices(batch_size(state), size):
        yield index(state, rows)


def slices(total: int, size: int) -> Iterator[slice]:
    """Iterate over consecutive ranges of at most `size` of `total` rows."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def expand_as(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] values to broadcast against [B, ...], in the dtype of a floating `like`.

    Values of each element, [B, L], broadcast against [B, L, ...].
    """
    dtype = like.dtype if like.is_floating_point() else values.dtype
    return values.to(dtype).reshape(*values.shape, *(1,) * (like.dim() - values.dim()))


def tensor_of(state: State) -> Tensor:
    """Return a tensor state; raise TypeError for a dict of fields."""
    if not isinstance(state, Tensor):
        raise TypeError(f"expected a tensor state, got fields {sorted(state)}; use a product")
    return state


def fields_of(state: State) -> dict[str, Tensor]:
    """Return the fields of a dict state; raise TypeError for a tensor."""
    if isinstance(state, Tensor):
        raise TypeError("expected a dict of fields, got a tensor state")
    return state


def is_state(value: object) -> TypeGuard[State]:
    """Return whether a value is a tensor or a dict of tensors, each with a batch."""
    parts = value.values() if isinstance(value, dict) else [value]
    return bool(parts) and all(isinstance(part, Tensor) and part.dim() > 0 for part in parts)


def num_rows(value: Any) -> int | None:
    """Return how many rows a value has: of a state B; None where it does not tell."""
    if is_state(value):
        sizes = {leaf.size(0) for leaf in leaves(value)}
        return sizes.pop() if len(sizes) == 1 else None
    # Of a tuple the parts may have the rows, as default_collate's and named tuples have.
    if isinstance(value, Mapping | Tensor | str | bytes | tuple):
        return None
    try:
        return len(value)
    except TypeError:  # also arrays of numpy without dimensions
        return None


def described(value: object) -> str:
    """Say what a value is: a state by its types and shapes, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict) and all(isinstance(leaf, Tensor) for leaf in value.values()):
        fields = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in sorted(value.items()))
        return f"fields of {fields}"
    return "None" if value is None else f"a {type(value).__name__}"
