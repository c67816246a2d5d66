"""Checkpoints in files that are whole at any moment."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lit_rlft.runs.files import whole, writing

__all__ = ["WholeCheckpoints"]


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, then puts it in its place.

    Lightning's own goes through memory and the system's folder of temporary files, from where it
    is copied: killed during the copy, it leaves half a checkpoint and nothing else.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; paths that are no local files are Lightning's.

        Raises:
            DiskError: The disk is full or broken; the checkpoint that was there before is intact.
        """
        if storage_options is not None or get_filesystem(path).protocol[0] != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remedy = "then run the same command again"
        if Path(path).is_file():
            remedy = f"then go on from the last whole one with --ckpt_path {path}"
        with writing(path, remedy), whole(Path(path)) as file:
            torch.save(checkpoint, file)
