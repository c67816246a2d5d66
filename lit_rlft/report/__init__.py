"""The report of runs: one HTML file that needs nothing else, and tables that compare runs."""

from typing import Any

from lit_rlft.moved import moved_name
from lit_rlft.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]

_OLD = ("before_after", "comparison", "write_png")
"""Names of a module that was called so in 0.1.0."""


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name, dict.fromkeys(_OLD, "lit_rlft.runs.before_after"))
