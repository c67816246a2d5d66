"""Does each kind of algorithm take its rounds on every embedded model?"""

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

from benchmarks.gpu.bench import Bench, Row
from lit_rlft.cli import main

__all__ = ["ALGORITHMS", "MODELS", "measure"]

ALGORITHMS = (
    *("p_graft", "ddpo", "flow_grpo", "nft", "dpo"),
    *("drtune", "adjoint_matching", "noise_ppo"),
)
"""Configs: one of each algorithm that tunes with a reward."""

MODELS = {
    "shapes": "16-mixed",
    "layout": "bf16-mixed",
    "molecule_soft": "32-true",
    "digits": "16-mixed",
    "layout_mixed": "bf16-mixed",
    "molecule_mixed": "bf16-mixed",
    "molecule_heavy": "bf16-mixed",
    "layout_gibbs": "32-true",
    "shapes_unconditional": "bf16-mixed",
    "gaussian_mixture": "32-true",
}
"""Configs of embedded models, and a precision for each."""


def measure(bench: Bench) -> None:
    """Run two small rounds and a validation of each algorithm's config, by the command line.

    "Refused" ended in one sentence: a reward without gradient, a process without noise.
    """
    models = bench.pick(MODELS, {"gaussian_mixture": "32-true"})
    for model, precision in models.items():
        bench.case({"model": model, "precision": precision}, partial(_all, model, precision))


def _all(model: str, precision: str) -> Row:
    found: dict[str, list[str]] = {"ran": [], "refused": [], "failed": []}
    said: dict[str, str] = {}
    for algorithm in ALGORITHMS:
        how, sentence = _fit(model, precision, algorithm)
        found[how].append(algorithm)
        if sentence:
            said[algorithm] = sentence
    return {**{how: ", ".join(names) for how, names in found.items()}, "said": said}


def _fit(model: str, precision: str, algorithm: str) -> tuple[str, str]:
    """Return how a fit ended, and in which words unless it ran."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *("fit", f"--config={model}", f"--config={algorithm}", f"--root={folder}"),
            *("--name=run", "--trainer.accelerator=auto", "--trainer.devices=1"),
            *(f"--trainer.precision={precision}", "--trainer.enable_progress_bar=false"),
            *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
            *("--data.batch_size=8", "--data.eval_batch_size=8", "--model.sampler.num_steps=12"),
        ]
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                main(words)
        except SystemExit as error:
            return "refused", str(error)[:300]
        except Exception as error:  # the other fits are worth their time
            return "failed", f"{type(error).__name__}: {error}"[:300]
    return "ran", ""
