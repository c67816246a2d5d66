"""Samples as files that a person can look at."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.kit.images import save_pictures
from lit_rlft.runs.files import writing
from lit_rlft.voting.places import SAMPLES, content_name, drawing_of
from lit_rlft.voting.questions import Candidate

__all__ = ["clean_drawings", "write_drawings"]

_NEW = ".new-"


def write_drawings(
    pipeline: Pipeline, samples: Any, condition: Condition, folder: Path, rank: int
) -> list[Candidate]:
    """Write samples in the domain's own format, and drawings of those that are no pictures.

    Files are named by their content, so that equal samples are one.

    Args:
        pipeline: Writes and draws.
        samples: Decoded, [B].
        condition: B rows.
        folder: Of the votes.
        rank: Of this process.

    Raises:
        DiskError: The disk takes no more.
    """
    target = folder / SAMPLES
    names = [f"{i:05}" for i in range(len(condition))]
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{_NEW}{rank}-", dir=folder) as new:
            paths = pipeline.save_samples(samples, condition, Path(new), names)
            _draw_the_rest(pipeline, samples, condition, paths)
            return [_moved(path, target) for path in paths]


def clean_drawings(folder: Path, rank: int) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for left in folder.glob(f"{_NEW}{rank}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _draw_the_rest(
    pipeline: Pipeline, samples: Any, condition: Condition, paths: Sequence[Path]
) -> None:
    """Render samples whose domain writes no picture beside them."""
    rows = [i for i, path in enumerate(paths) if drawing_of(path) is None]
    if rows:
        some = torch.tensor(rows)
        pictures = pipeline.render(pipeline.index_samples(samples, some), condition.index(some))
        save_pictures(pictures, paths[0].parent, [paths[i].stem for i in rows])


def _moved(path: Path, target: Path) -> Candidate:
    """Give a sample and its drawing the names of their content."""
    drawing = drawing_of(path)
    assert drawing is not None
    content = content_name(path.read_bytes())
    names = []
    for file in (path, drawing):
        new = target / f"{content}{file.suffix}"
        if file.exists():  # a picture is its own drawing
            os.replace(file, new)
        names.append(f"{target.name}/{new.name}")
    return Candidate(*names)
