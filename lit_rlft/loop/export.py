"""The folder of the tuned model, replaced as a whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlft.distributed import together
from lit_rlft.runs.card import write_card
from lit_rlft.runs.files import write_folder, write_whole, writing
from lit_rlft.runs.readme import README

__all__ = ["write_tuned"]


def write_tuned(
    folder: Path,
    export: Callable[[Path], list[Path]] | None,
    world_size: int,
    facts: Mapping[str, Any],
    card: Callable[[list[str], Mapping[str, Any]], str],
) -> None:
    """Write the tuned model; an earlier one stays until the new one is whole.

    Args:
        folder: Where it belongs.
        export: Writes it into the folder it is given, and returns its files; None on processes
            that write nothing.
        world_size: Number of processes; all of them must call this.
        facts: What the folder says of the model, for programs that load it.
        card: Returns the model card, given the names of the files and the facts.

    Raises:
        DiskError: The disk is full or broken; the earlier model and the checkpoints are intact.
    """
    last = folder.with_name("checkpoints") / "last.ckpt"
    remedy = f"then run the same command again with --ckpt_path {last}, which is intact"
    with together(world_size), writing(folder, remedy):
        for path in (
            write_folder(folder, _with_cards(export, facts, card)) if export is not None else []
        ):
            rank_zero_info(f"tuned model: {path}")


def _with_cards(
    export: Callable[[Path], list[Path]],
    facts: Mapping[str, Any],
    card: Callable[[list[str], Mapping[str, Any]], str],
) -> Callable[[Path], list[Path]]:
    """Return an export that writes the cards too, unless there is nothing to export."""

    def whole(folder: Path) -> list[Path]:
        written = export(folder)
        if written:
            names = sorted(path.name for path in folder.iterdir())
            write_card(folder, facts)
            write_whole(folder / README, card(names, facts))
        return written

    return whole
