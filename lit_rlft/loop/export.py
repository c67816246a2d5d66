"""The folder of the tuned model, replaced as a whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlft.core.checks import UsageError
from lit_rlft.distributed import together
from lit_rlft.runs.card import write_card
from lit_rlft.runs.files import no_paths, write_folder, write_whole, writing
from lit_rlft.runs.readme import README

__all__ = ["write_tuned"]


def write_tuned(
    folder: Path,
    export: Callable[[Path], list[Path]] | None,
    world_size: int,
    facts: Mapping[str, Any],
    card: Callable[[list[str], Mapping[str, Any]], str],
    method: str,
) -> None:
    """Write the tuned model; an earlier one stays until the new one is whole.

    Where the export does not say what it wrote, what it wrote is kept nevertheless.

    Args:
        folder: Where it belongs.
        export: Writes it into the folder it is given, and returns its files; None on processes
            that write nothing.
        world_size: Number of processes; all of them must call this.
        facts: What the folder says of the model, for programs that load it.
        card: Returns the model card, given the names of the files and the facts.
        method: Name of the method that exports, for messages.

    Raises:
        UsageError: The export did not return paths; the tuned model is written.
        DiskError: The disk is full or broken; the earlier model and the checkpoints are intact.
    """
    last = folder.with_name("checkpoints") / "last.ckpt"
    remedy = f"then run the same command again with --ckpt_path {last}, which is intact"
    with together(world_size), writing(folder, remedy):
        if export is None:
            return
        problems: list[str] = []
        for path in write_folder(folder, _with_cards(export, facts, card, method, problems)):
            rank_zero_info(f"tuned model: {path}")
        if problems:
            raise UsageError(problems[0])


def _with_cards(
    export: Callable[[Path], list[Path]],
    facts: Mapping[str, Any],
    card: Callable[[list[str], Mapping[str, Any]], str],
    method: str,
    problems: list[str],
) -> Callable[[Path], list[Path]]:
    """Return an export that writes the cards too, unless there is nothing to export.

    Where the export returns no paths, that is added to `problems`: its files are the folder's.
    """

    def whole(folder: Path) -> list[Path]:
        written = export(folder)
        if problem := no_paths(written, method):
            problems.append(problem)
            written = sorted(filter(Path.is_file, folder.rglob("*")))
        if written:
            names = sorted(path.name for path in folder.iterdir())
            write_card(folder, facts)
            write_whole(folder / README, card(names, facts))
        return written

    return whole
