"""What a kernel machine has to say, for people: one HTML page, and the same figures by matplotlib."""

from lightning_pathkernel.report.figures import (
    plot_class_heatmap,
    plot_error_budget,
    plot_examples,
    plot_fidelity,
    plot_kernel_velocity,
    plot_ledger,
    plot_path,
)
from lightning_pathkernel.report.history import read_history
from lightning_pathkernel.report.loggers import log_figures
from lightning_pathkernel.report.options import ReportOptions
from lightning_pathkernel.report.write import report_directory, write_report

__all__ = [
    "ReportOptions",
    "log_figures",
    "plot_class_heatmap",
    "plot_error_budget",
    "plot_examples",
    "plot_fidelity",
    "plot_kernel_velocity",
    "plot_ledger",
    "plot_path",
    "read_history",
    "report_directory",
    "write_report",
]
