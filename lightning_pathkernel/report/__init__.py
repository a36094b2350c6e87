"""What a kernel machine has to say, for people: one HTML page, and the same figures by matplotlib."""

from lightning_pathkernel.report.history import read_history
from lightning_pathkernel.report.options import ReportOptions
from lightning_pathkernel.report.write import report_directory, write_report

__all__ = ["ReportOptions", "read_history", "report_directory", "write_report"]
