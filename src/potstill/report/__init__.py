"""Write the report of a run: one HTML page that opens offline."""

from potstill.report.page import write_report

__all__ = [
    "write_report",
]
