"""Statistics of real images that programs which compute FID save: mean and covariance."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.files import existing, reason

__all__ = ["read_moments"]

_SYMMETRIC = 1e-5
"""Of the largest number: rounding of covariances in single precision."""


def read_moments(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of an .npz file with `mu` and `sigma`, float64.

    Args:
        path: The file.
        size: D of the features that they are to be of.

    Raises:
        UsageError: It is missing, or holds something else.
    """
    source = existing(path)
    try:
        with np.load(source, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # numpy reads headers as Python, which fails in many ways
        raise UsageError(
            f"{path} is no .npz file with arrays mu and sigma, as pytorch-fid and clean-fid write "
            f"them ({reason(error)})"
        ) from error
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UsageError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}, and the features have "
            f"{size} numbers; give the feature network that the file was made with"
        )
    largest = np.abs(covariance).max()
    finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
    if not finite or np.abs(covariance - covariance.T).max() > _SYMMETRIC * largest:
        raise UsageError(f"{path} holds no covariance: sigma is not finite, or not symmetric")
    return torch.from_numpy(mean), torch.from_numpy((covariance + covariance.T) / 2)
