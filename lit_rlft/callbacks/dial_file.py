"""What a test's dial found, as a table and in TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lit_rlft.evaluation.dial import dial_csv
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.runs.files import write_whole

__all__ = ["DIAL", "write_dial"]

DIAL, _ENDS = "dial.csv", ("reference", "tuned")


def write_dial(
    folder: Path,
    summary: Mapping[str, Mapping[str, Moments]],
    rows: Sequence[Mapping[str, Any]],
    writer: SummaryWriter | None,
) -> None:
    """Write the settings of a dial, if there are any, as a table and to TensorBoard, in percent."""
    if not rows:
        return
    write_whole(folder / DIAL, dial_csv(rows, {arm: summary[arm] for arm in _ENDS}))
    for row in rows if writer is not None else ():
        for name, moments in row["metrics"].items():
            tag, percent = f"dial/{row['setting']}/{name}", round(100 * row["value"])
            writer.add_scalar(tag, moments["mean"], percent)  # type: ignore[union-attr]
