"""What was quantized and what it cost: as JSON, as tables for a terminal, and as one HTML page with plots."""

from jgptq.report.page import report_html
from jgptq.report.record import read_report, report_json, totals
from jgptq.report.tables import (
    estimate_lines,
    estimate_table,
    nbytes,
    profile_table,
    report_table,
    shape_text,
    weights_table,
)

__all__ = [
    "estimate_lines",
    "estimate_table",
    "nbytes",
    "profile_table",
    "read_report",
    "report_html",
    "report_json",
    "report_table",
    "shape_text",
    "totals",
    "weights_table",
]
