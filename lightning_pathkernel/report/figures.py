"""The report's figures for notebooks, in the manner of torchmetrics' ``plot``: each returns figure and axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_pathkernel.explanation import Explanation
from lightning_pathkernel.report.classes import class_name, class_table, ordered, sums_by_class
from lightning_pathkernel.report.examples import ExampleSource
from lightning_pathkernel.report.history import METRICS, History, tidy
from lightning_pathkernel.report.items import as_pixels
from lightning_pathkernel.report.numbers import decimals_for, signed
from lightning_pathkernel.report.overview import chord_rows
from lightning_pathkernel.report.waterfall import waterfall

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

__all__ = [
    "plot_class_heatmap",
    "plot_error_budget",
    "plot_examples",
    "plot_fidelity",
    "plot_kernel_velocity",
    "plot_ledger",
    "plot_path",
]

ACCENT, FOR, AGAINST, INK, MUTED = "#0b6b5c", "#1b6ca8", "#b04c0c", "#191c20", "#565e67"
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": ACCENT, "linewidth": 2, "marker": "o", "markersize": 4},
    {"color": INK, "linewidth": 1.4, "linestyle": "--", "marker": "o", "markersize": 3},
    {"color": MUTED, "linewidth": 1.4, "linestyle": ":", "marker": "o", "markersize": 3},
)


def _axis(ax: Any, size: tuple[float, float] = (6.0, 3.6)) -> tuple[Any, Any]:
    """Figure and axis: those given, or new ones."""
    if ax is not None:
        return ax.get_figure(), ax
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed: pip install 'lightning-pathkernel[report]'. The HTML "
            "report does without it."
        ) from error
    return plt.subplots(figsize=size, layout="constrained")


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def _curves(history: History, names: Sequence[str], title: str, ax: Any) -> tuple[Any, Any]:
    figure, ax = _axis(ax)
    entries = tidy(history)
    steps = [entry["step"] for entry in entries]
    drawn = 0
    for name, style in zip(names, _STYLES, strict=False):
        values = [np.nan if entry.get(name) is None else entry[name] for entry in entries]
        if any(name in entry for entry in entries):
            ax.plot(steps, values, label=METRICS[name].label, **style)
            drawn += 1
    if not drawn:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color=MUTED)
    elif drawn > 1:
        ax.legend(frameon=False)
    ax.set(xlabel="optimiser step", title=title)
    _plain(ax)
    return figure, ax


def plot_fidelity(history: History, ax: Any = None) -> tuple[Any, Any]:
    """Fidelity over training, beside the left-end rule and the tangent kernel at initialisation.

    Args:
        history: Entries of logged metrics, as `read_history` gives them; None and NaN leave a gap.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> from matplotlib.figure import Figure  # in a notebook leave ax out
        >>> from lightning_pathkernel.report import plot_fidelity
        >>> history = [{"step": 50, "fidelity": 0.97}, {"step": 100, "fidelity": 0.99}]
        >>> figure, ax = plot_fidelity(history, ax=Figure().subplots())
        >>> [float(value) for value in ax.get_lines()[0].get_ydata()]
        [0.97, 0.99]
    """
    figure, ax = _curves(history, ("fidelity", "fidelity_left", "fidelity_linearized"), "Fidelity", ax)
    low, _ = ax.get_ylim()
    ax.set_ylim(max(low, -0.25), 1.02)  # what lies below is as good as useless, and would hide the rest
    return figure, ax


def plot_error_budget(history: History, ax: Any = None) -> tuple[Any, Any]:
    """The error budget over training: norms relative to the learned change.

    Args:
        history: As in `plot_fidelity`.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel.report import plot_error_budget
        >>> figure, ax = plot_error_budget([{"step": 50, "error_sketch": 0.03}], ax=Figure().subplots())
        >>> ax.get_title()
        'Error budget'
    """
    figure, ax = _curves(history, ("error_sketch", "error_quadrature", "error_unattributed"), "Error budget", ax)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    return figure, ax


def plot_kernel_velocity(history: History, ax: Any = None) -> tuple[Any, Any]:
    """Kernel velocity over training: 1 - cosine of the tangent kernels at consecutive nodes.

    Args:
        history: As in `plot_fidelity`.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel.report import plot_kernel_velocity
        >>> figure, ax = plot_kernel_velocity([{"step": 50, "kernel_velocity": 0.1}], ax=Figure().subplots())
        >>> ax.get_xlabel()
        'optimiser step'
    """
    figure, ax = _curves(history, ("kernel_velocity",), "Kernel velocity", ax)
    ax.set_ylim(bottom=0)
    return figure, ax


def plot_path(machine: KernelMachine, ax: Any = None) -> tuple[Any, Any]:
    """The chords of the path: how far the weights moved between its nodes, relative to their norm.

    Args:
        machine: The machine.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel.report import plot_path
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> figure, axis = plot_path(tiny_machine(), ax=Figure().subplots())
        >>> len(axis.patches)  # chords
        3
    """
    figure, ax = _axis(ax)
    rows = chord_rows(machine.path)
    ax.bar(
        [row.first for row in rows], [100 * row.displacement for row in rows],
        [max(row.last - row.first, 0.3) for row in rows], align="edge", color=ACCENT, edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    ax.set(xlabel="optimiser step", ylabel="displacement, % of the weights' norm", title="Nodes along the path")
    _plain(ax)
    return figure, ax


def plot_ledger(
    explanation: Explanation, query: int = 0, contributions: Tensor | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """One query's ledger as a waterfall, from the initial model to the network's output.

    Args:
        explanation: The explanation.
        query: Which of its queries.
        contributions: `KernelMachine.contributions` of the same queries, ``[Q, N]``, to draw examples for and against
            apart; None for their sum.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel import Explanation
        >>> from lightning_pathkernel.report import plot_ledger
        >>> ledger = {"initial": 0.1, "decay": -0.2, "buffers": 0.0, "examples": 4.0, "quadrature": 0.0, "sketch": 0.1,
        ...           "unattributed": 0.0}
        >>> ledger = {name: torch.tensor([value]) for name, value in ledger.items()}
        >>> ids, shares, target = torch.tensor([[7, 3]]), torch.tensor([[4.5, -0.5]]), torch.tensor([0])
        >>> why = Explanation(torch.tensor([3.9]), ids, shares, ledger, target)
        >>> figure, ax = plot_ledger(why, ax=Figure().subplots())
        >>> round(float(ax.patches[-1].get_width()), 3)  # the network's output
        4.0
    """
    figure, ax = _axis(ax, (6.4, 3.8))
    ledger = {name: float(value[query]) for name, value in explanation.ledger.items()}
    sides = []
    if contributions is not None:
        row = contributions[query].double()
        sides = [float(row.clamp_min(0).sum()), float(row.clamp_max(0).sum())]
    steps, _ = waterfall(ledger, *sides)
    colours = {"for": FOR, "against": AGAINST, "total": INK, "zero": MUTED}
    running = 0.0
    for place, step in enumerate(steps):
        start = 0.0 if step.total else running
        running = start + step.value
        ax.barh(place, step.value, left=start, color=colours[step.sign], height=0.6)
        ax.annotate(f" {step.text}", (max(start, running), place), va="center", fontsize=8, color=MUTED)
    ax.axvline(0, color="0.7", linewidth=0.8)
    ax.set_yticks(range(len(steps)), [step.label for step in steps])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel="explained output", title="Ledger")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure, ax


def plot_examples(
    explanation: Explanation,
    examples: Any = None,
    query: int = 0,
    labels: Any = None,
    names: Mapping[int, str] | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """The training examples for and against one query: their contributions, with their images where they have any.

    Args:
        explanation: The explanation.
        examples: The training examples, as `ReportOptions.examples`; None for bars alone.
        query: Which of the explanation's queries.
        labels: Their labels, by id.
        names: The user's string ids, as `KernelMachine.example_names`.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel import Explanation
        >>> from lightning_pathkernel.report import plot_examples
        >>> ids, shares, target = torch.tensor([[1, 0]]), torch.tensor([[4.5, -0.5]]), torch.tensor([0])
        >>> why = Explanation(torch.tensor([3.9]), ids, shares, {}, target)
        >>> figure, ax = plot_examples(why, ["a cat", "a dog"], labels=["cat", "dog"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['1 (dog)', '0 (cat)']
    """
    pairs = zip(explanation.example_ids[query].tolist(), explanation.contributions[query].tolist(), strict=True)
    shown = {i: c for i, c in pairs if c}
    order = sorted(shown, key=shown.__getitem__, reverse=True)
    figure, ax = _axis(ax, (6.0, 0.6 + 0.36 * max(1, len(order))))
    source = ExampleSource(examples, labels, names=names)
    values, places = [shown[i] for i in order], range(len(order))
    ax.barh(places, values, color=[FOR if v > 0 else AGAINST for v in values], height=0.6)
    decimals = decimals_for(values)
    for place, value in zip(places, values, strict=True):
        ax.annotate(signed(value, decimals), (value, place), va="center", fontsize=8, color=MUTED,
                    ha="left" if value > 0 else "right", xytext=(3 if value > 0 else -3, 0),
                    textcoords="offset points")  # fmt: skip
    texts = [(source.name(i), class_name(source.label(i), None)) for i in order]
    ax.set_yticks(places, [f"{name} ({label})" if label else name for name, label in texts])
    if examples is not None:
        _thumbnails(ax, [source.item(i) for i in order])
    ax.axvline(0, color="0.7", linewidth=0.8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(xlabel="contribution to the explained output", title="Training examples for and against")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure, ax


def _thumbnails(ax: Any, items: Sequence[Any]) -> None:
    """Each example's image between its bar and its name."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    pictures = [as_pixels(item.detach().cpu()) if isinstance(item, Tensor) else None for item in items]
    if not any(picture is not None for picture in pictures):
        return
    ax.tick_params(axis="y", length=0, pad=26)
    for place, picture in enumerate(pictures):
        if picture is not None:
            pixels = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
            image = OffsetImage(pixels, zoom=22 / max(pixels.shape[:2]), interpolation="nearest")
            ax.add_artist(
                AnnotationBbox(image, (0, place), xycoords=ax.get_yaxis_transform(), xybox=(-14, 0),
                               boxcoords="offset points", frameon=False)
            )  # fmt: skip


def plot_class_heatmap(
    contributions: Tensor, target: Tensor, labels: Any, class_names: Sequence[str] | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Which classes of training examples speak for which class: sums by class, averaged over queries.

    Args:
        contributions: `KernelMachine.contributions` of some queries, ``[Q, N]``.
        target: The class explained of each, ``[Q]``.
        labels: Labels of the examples in the order of `KernelMachine.example_ids`, ``[N]``.
        class_names: Names of the classes, by number.
        ax: A matplotlib axis to draw on; None for a new figure.

    Returns:
        Figure and axis.

    Examples:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from lightning_pathkernel.report import plot_class_heatmap
        >>> contributions = torch.tensor([[2.0, 1.0, -1.0], [0.0, -1.0, 3.0]])
        >>> target, labels = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
        >>> figure, ax = plot_class_heatmap(contributions, target, labels, ax=Figure().subplots())
        >>> ax.images[0].get_array().tolist()
        [[3.0, -1.0], [-1.0, 3.0]]
    """
    known = [label.item() if hasattr(label, "item") else label for label in labels]
    place = {label: k for k, label in enumerate(ordered(known))}
    sums = sums_by_class(contributions, torch.tensor([place[label] for label in known]), len(place)).numpy()
    table = class_table(sums, torch.as_tensor(target).tolist(), known, class_names)
    figure, ax = _axis(ax, (5.4, 4.6))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("against-for", [AGAINST, "white", FOR])
    largest = float(np.abs(table.values).max()) or 1.0
    image = ax.imshow(table.values, cmap=colours, vmin=-largest, vmax=largest)
    every = max(1, len(table.columns) // 20)
    ax.set_xticks(range(0, len(table.columns), every), table.columns[::every])
    ax.set_yticks(range(0, len(table.rows), every), table.rows[::every])
    ax.set(xlabel="class of the training examples", ylabel="class explained", title="Classes for and against classes")
    figure.colorbar(image, ax=ax, label="mean contribution", shrink=0.85)
    return figure, ax
