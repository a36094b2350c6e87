"""The figures handed to TensorBoard and Weights & Biases, by loggers that are told by their class's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_pathkernel.report.figures import plot_error_budget, plot_fidelity, plot_kernel_velocity, plot_path
from lightning_pathkernel.report.history import History

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

__all__ = ["log_figures"]


def log_figures(loggers: Iterable[Any], history: History, machine: KernelMachine | None = None) -> list[str]:
    """Log the figures of training.

    Args:
        loggers: Lightning's loggers; ``TensorBoardLogger`` and ``WandbLogger``, and classes derived from them, get the
            figures, all others nothing.
        history: Logged metrics: fidelity, error budget and kernel velocity over training.
        machine: Its path is drawn too; None for none.

    Returns:
        Names of the classes of those that got the figures.

    Examples:
        >>> from lightning_pathkernel.report import log_figures
        >>> log_figures([], [{"step": 50, "fidelity": 0.97}])
        []
    """
    takers = [(logger, _kind(logger)) for logger in loggers]
    takers = [(logger, kind) for logger, kind in takers if kind]
    if not takers:
        return []
    step = int(max([entry.get("step") or 0.0 for entry in history], default=0.0))
    for name, figure in _figures(history, machine).items():
        for logger, kind in takers:
            if kind == "TensorBoardLogger":
                logger.experiment.add_figure(f"pathkernel/{name}", figure, global_step=step, close=False)
            else:
                logger.log_image(key=f"pathkernel/{name}", images=[figure])
    return [type(logger).__name__ for logger, _ in takers]


def _kind(logger: Any) -> str:
    names = {each.__name__ for each in type(logger).__mro__}
    return next((known for known in ("TensorBoardLogger", "WandbLogger") if known in names), "")


def _figures(history: History, machine: KernelMachine | None) -> dict[str, Any]:
    """Figures outside pyplot, so that none stays open and no backend is chosen."""
    from matplotlib.figure import Figure

    plots: dict[str, Any] = {
        "fidelity_over_training": (plot_fidelity, history),
        "error_budget": (plot_error_budget, history),
        "kernel_velocity_over_training": (plot_kernel_velocity, history),
    }
    if machine is not None:
        plots["path"] = (plot_path, machine)
    out = {}
    for name, (plot, what) in plots.items():
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        plot(what, ax=figure.subplots())
        out[name] = figure
    return out
