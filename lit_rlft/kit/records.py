"""Records of conditions as JSON can hold them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """Return a record as JSON can hold it: tensors as lists, what is unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
