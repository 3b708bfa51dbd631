"""The HTML report of an evaluation."""

from cpm_rcnn.reporting.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
