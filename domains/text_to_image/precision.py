"""Precisions of networks, by their names in configs."""

import warnings
from typing import Literal, get_args

import torch

from lit_rlft.core.checks import one_of, require

__all__ = ["FrozenDtype", "Precision", "dtype_name", "precision", "precisions"]

Precision = Literal["float32", "float16", "bfloat16"]
FrozenDtype = Literal["auto", "float32", "float16", "bfloat16"]


def precision(owner: object, dtype: str, argument: str = "dtype") -> torch.dtype:
    """Return the type of a precision's name.

    Raises:
        BadArgument: There is no such precision.
    """
    one_of(owner, argument, get_args(Precision), dtype)
    kind: torch.dtype = getattr(torch, dtype)
    return kind


def precisions(
    owner: object, frozen_dtype: FrozenDtype, dtype: Precision | None, save_dtype: Precision
) -> tuple[FrozenDtype, torch.dtype]:
    """Return the precision of a pipeline's frozen weights, and the type of its files.

    Args:
        owner: The pipeline.
        frozen_dtype: Of the frozen weights.
        dtype: The same under its old name.
        save_dtype: Of the files.

    Raises:
        BadArgument: There is no such precision, or the old name has another one.
    """
    return _new(owner, frozen_dtype, dtype), precision(owner, save_dtype, "save_dtype")


def _new(owner: object, frozen_dtype: FrozenDtype, dtype: Precision | None) -> FrozenDtype:
    """Return `frozen_dtype`, or what is given under its old name, and say that it is old."""
    one_of(owner, "frozen_dtype", get_args(FrozenDtype), frozen_dtype)
    one_of(owner, "dtype", (*get_args(Precision), None), dtype)
    if dtype is None:
        return frozen_dtype
    rule = f"null beside frozen_dtype {frozen_dtype}, which is its new name"
    require(frozen_dtype in ("auto", dtype), owner, "dtype", rule)
    warnings.warn(
        f"pipeline.dtype is called frozen_dtype now: write frozen_dtype: {dtype} instead; the old "
        "name is deprecated and goes next",
        FutureWarning,
        stacklevel=4,
    )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision in configs."""
    return str(dtype).removeprefix("torch.")
