"""What a run spends, and who pays."""

from functools import partial

from lit_rlft.moved import moved_name

_OLD = (
    "Cost",
    "count_calls",
    "count_flops",
    "flop_counter",
    "flops_per_call",
    "now",
    "peak_memory_bytes",
)
"""Names of 0.1.0, when this package was a module."""

__getattr__ = partial(moved_name, __name__, moved=dict.fromkeys(_OLD, "lit_rlft.cost.counters"))
