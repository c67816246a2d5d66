"""The report of runs: one HTML file that needs nothing else, and tables that compare runs."""

from lit_rlft.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
