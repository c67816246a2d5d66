"""The domain's samples: points [B, d]."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_rlft.core.checks import UsageError

__all__ = ["check_points", "save_points"]


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
        path.write_text(json.dumps(point) + "\n")
    return paths
