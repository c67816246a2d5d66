"""Pictures of two models side by side for a judge who does not know which is whose."""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from lit_rlft.runs.before_after import png
from lit_rlft.runs.files import PARTIAL, write_whole, writing
from lit_rlft.voting.places import BLIND, PAIRS, content_name

__all__ = ["write_pairs"]


def write_pairs(
    run: Path, tuned: Iterable[Tensor], reference: Iterable[Tensor], labels: Iterable[str]
) -> Path:
    """Write pictures of the same conditions and noise, and the list of pairs; return the folder.

    Files are named by their content: votes on pictures of another checkpoint stay what they are.

    Args:
        run: The run's folder.
        tuned: Pictures of the tuned model, uint8 [3, H, W] each.
        reference: Those of the reference.
        labels: What each pair was conditioned on.

    Raises:
        DiskError: The disk takes no more.
    """
    folder = run / BLIND
    with writing(folder):
        lines = [
            {"label": label, "tuned": _written(folder, "tuned", own)}
            | {"reference": _written(folder, "reference", other)}
            for own, other, label in zip(tuned, reference, labels, strict=False)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(folder / PAIRS, text)
    return folder


def _written(folder: Path, arm: str, picture: Tensor) -> str:
    content = png(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()))
    name = f"{arm}/{content_name(content)}.png"
    path = folder / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}{PARTIAL}")
        partial.write_bytes(content)
        partial.replace(path)
    return name
