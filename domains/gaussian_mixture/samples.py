"""The domain's samples: points [B, d]."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, loading

__all__ = ["check_points", "read_point", "save_points"]


def check_points(samples: Any) -> Tensor:
    """Return samples that are points, as they are.

    Raises:
        UsageError: They are no tensor [B, d].
    """
    if not isinstance(samples, Tensor) or samples.dim() != 2:
        shape = list(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise UsageError(
            f"this reward or metric takes points [B, d], got {shape}; choose one of the "
            "pipeline's own domain"
        )
    return samples


def save_points(points: Tensor, folder: Path, names: Sequence[str]) -> list[Path]:
    """Write the coordinates of each point as `<folder>/<name>.json`; return the paths."""
    paths = [folder / f"{name}.json" for name in names]
    for point, path in zip(points.tolist(), paths, strict=True):
        path.write_text(json.dumps(point) + "\n", encoding="utf-8")
    return paths


def read_point(sample: Any, folder: Path, size: int) -> Tensor:
    """Return the point, float32 [size], of a list of numbers or of a file of `save_points`.

    Raises:
        UsageError: It is no such list.
    """
    if isinstance(sample, str):
        with loading(f"{sample} cannot be read as a point"):
            sample = json.loads((folder / sample).read_text(encoding="utf-8"))
    numbers = isinstance(sample, list) and all(isinstance(v, int | float) for v in sample)
    if not numbers or len(sample) != size or not all(map(math.isfinite, sample)):
        raise UsageError(f"a point is a list of {size} finite numbers, got {str(sample)[:60]}")
    return torch.tensor(sample, dtype=torch.float32)
