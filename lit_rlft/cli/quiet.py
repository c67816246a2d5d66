"""Silences messages of other libraries that do not concern this one's users."""

import logging
import os
import re
import sys
import warnings

__all__ = ["quieten"]

_LOGGERS = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_LINES = re.compile(
    r"Seed set to |GPU available: |TPU available: |.*\[?litlogger|LOCAL_RANK: |.*stopped: `max_"
    r"|Loaded model weights from |Initializing distributed: |-{20,}\ndistributed_backend"
    r"|Using (16bit|bfloat16|16-bit) .*Automatic Mixed Precision|You are using a CUDA device"
)
"""Log lines of Lightning's; what matters of them is in the line that a run starts with."""

_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # all but what is trained
    "You're resuming from a checkpoint that ended before the epoch ended",  # data.py goes on there
    "Using ModelCheckpoint with manual optimization",  # between rounds
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+_dataloader' does not have many workers",  # conditions are made in no time
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "GPU available but not used",  # the configs say which device
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`",  # values are gathered before
    r"Using `DistributedSampler` with the dataloaders",  # rows are shared out without repeats
    # its counters start anew where other settings say when it saves
    r"Be aware that when using `ckpt_path`, callbacks .*: \[\"LastCheckpoint\{[^\"]*\"\]",
    "Checkpoint directory .* exists and is not empty",  # after a run was resumed
    r"Trying to infer the `batch_size` from an ambiguous collection",
)
"""Warnings, as patterns, about what is meant to be so."""

_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",  # notes on torchvision, which is left out on purpose
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Keep all lines but those above."""
        return _LINES.match(record.getMessage()) is None


def quieten() -> None:
    """Switch off notes, tips and false alarms, before the libraries that make them are imported.

    Where standard error is no terminal there are no progress bars either.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DELAY", "1000000000")  # read when tqdm is imported
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    quiet = _Filter()
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Filter) for one in logger.filters):
            logger.addFilter(quiet)
