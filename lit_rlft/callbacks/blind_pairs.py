"""Keeps a test's pictures for a judge who does not know which model drew which."""

from lightning import Callback, LightningModule, Trainer

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.evaluation.kept import first_of_all
from lit_rlft.runs.folder import run_folder
from lit_rlft.voting.blind_pairs import write_pairs

__all__ = ["BlindPairs"]


class BlindPairs(Callback):
    """Writes the pictures of `test` into `blind/`, which `lit-rlft vote RUN --blind` shows.

    They are those of comparison.png (run_files.num_conditions).
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the pictures of both models and the list of pairs."""
        assert isinstance(pl_module, RewardFineTuner)
        evaluator = pl_module.evaluator
        number, size = evaluator.num_pictures, trainer.world_size
        measurements = first_of_all(evaluator.measurements, number, size)
        if not trainer.is_global_zero or not measurements.tuned.pictures:
            return
        tuned, reference = measurements.tuned, measurements.reference
        pictures = tuned.all_pictures(), reference.all_pictures()
        write_pairs(run_folder(trainer), *pictures, tuned.all_labels())
