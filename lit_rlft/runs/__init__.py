"""The folder of a run, and the picture in it."""

from functools import partial

from lit_rlft.moved import moved_name

_OLD = ("make_folder", "run_folder", "summary_writer", "trainer_settings")
"""Names of 0.1.0, when this package was a module."""

__getattr__ = partial(moved_name, __name__, moved=dict.fromkeys(_OLD, "lit_rlft.runs.folder"))
