"""The list of what a run's data leave out, kept in its folder."""

from lightning import Callback, LightningModule, Trainer

from lit_rlft.kit.bad_entries import NothingLeft
from lit_rlft.kit.sources import SourceData
from lit_rlft.runs.folder import run_folder

__all__ = ["LeftOut"]


class LeftOut(Callback):
    """Writes left_out.txt, a sentence for every entry that the run's data leave out.

    Also where nothing is left and the run ends before it begins.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the list."""
        _write(trainer)

    on_test_start = on_train_start

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the list of data of which nothing is left."""
        # Raised with the key of the data, where the command line reads them.
        if any(isinstance(one, NothingLeft) for one in (exception, exception.__cause__)):
            _write(trainer)


def _write(trainer: Trainer) -> None:
    data = getattr(trainer, "datamodule", None)
    listing = data.left_out() if isinstance(data, SourceData) and trainer.is_global_zero else ""
    if listing:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "left_out.txt").write_text(listing, encoding="utf-8")
