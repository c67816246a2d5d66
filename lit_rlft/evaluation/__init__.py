"""The tuned model beside the reference: the same conditions, the same noise."""

from functools import partial

from lit_rlft.moved import moved_name

_OLD = ("Arm", "Measured", "moments")
"""Names of 0.1.0, when this package was a module."""

__getattr__ = partial(
    moved_name, __name__, moved=dict.fromkeys(_OLD, "lit_rlft.evaluation.measurements")
)
