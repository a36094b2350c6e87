"""Pictures of measurements, as SVG, from files with one JSON object per line.

    python -m benchmarks.plots grid GRID.jsonl docs/plots
    python -m benchmarks.plots growth GROWTH.jsonl docs/plots

``grid``: lines ``{case, optimizer, nodes, sketch_dim, seed, fidelity, pearson}``; for each case what is missing of
fidelity and Pearson to 1, against ``sketch_dim`` and against the number of nodes, by optimiser: the median over seeds
and, shaded, their range. ``growth``: the points of `benchmarks.growth`. One file leads to the same bytes every time.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.growth import COLUMNS, SWEEPS
from benchmarks.page import read_lines

__all__ = ["draw_grid", "draw_growth"]

Row = Mapping[str, Any]
FIELDS = {"case", "optimizer", "nodes", "sketch_dim", "seed", "fidelity", "pearson"}
LEAST = 1e-6
"""What is missing to 1 is drawn no smaller than this."""
DRAWN = ("plain_ms", "recorded_ms", "node_ms", "plain_mb", "recorded_mb", "artifact_mb", "rows_mb", "query_ms")


def _check(rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, 1):
        lacking = sorted(FIELDS - row.keys())
        if lacking:
            raise ValueError(f"line {number} has no {', '.join(lacking)}; expected {', '.join(sorted(FIELDS))}")


def _missing(rows: Sequence[Row], quantity: str, x: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Against ``x``: median, least and most of ``1 - quantity`` over seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row[x], []).append(max(1 - row[quantity], LEAST))
    xs = sorted(found)
    middle = [statistics.median(found[value]) for value in xs]
    return xs, middle, [min(found[value]) for value in xs], [max(found[value]) for value in xs]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return path


def _panel(axes: Any, rows: Sequence[Row], quantity: str, x: str, line: str, colours: Mapping[int, Any]) -> None:
    for value, colour in colours.items():
        xs, middle, low, high = _missing([row for row in rows if row[line] == value], quantity, x)
        if xs:
            axes.plot(xs, middle, marker="o", markersize=3, color=colour, label=f"{line} = {value}")
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def draw_grid(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Two pictures for each case: against ``sketch_dim`` by nodes, and against nodes by ``sketch_dim``.

    Args:
        rows: Runs, as said above.
        directory: Where the pictures go.

    Returns:
        The files.

    Raises:
        ValueError: If a row lacks a field.
    """
    _check(rows)
    paths = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        optimizers = list(dict.fromkeys(row["optimizer"] for row in mine))
        for x, line in (("sketch_dim", "nodes"), ("nodes", "sketch_dim")):
            values = sorted({row[line] for row in mine})
            shades = mpl.colormaps["viridis"].resampled(len(values) + 1)
            colours = {value: shades(index) for index, value in enumerate(values)}
            figure = Figure(figsize=(3.2 * len(optimizers) + 1.2, 5.2))
            grid = figure.subplots(2, len(optimizers), sharex=True, sharey="row", squeeze=False)
            for column, optimizer in enumerate(optimizers):
                chosen = [row for row in mine if row["optimizer"] == optimizer]
                for axes, quantity in zip(grid[:, column], ("fidelity", "pearson"), strict=True):
                    _panel(axes, chosen, quantity, x, line, colours)
                grid[0, column].set_title(optimizer, fontsize=10)
                grid[1, column].set_xlabel(x)
            grid[0, 0].set_ylabel("1 - fidelity")
            grid[1, 0].set_ylabel("1 - Pearson")
            grid[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
            figure.suptitle(case, fontsize=11)
            paths.append(_save(figure, directory / f"{_slug(case)}-{_slug(x)}.svg"))
    return paths


def draw_growth(rows: Sequence[Row], directory: Path) -> Path:
    """One picture: every measured column against every size, both logarithmic.

    Args:
        rows: Points of `benchmarks.growth`.
        directory: Where the picture goes.

    Returns:
        The file.
    """
    sweeps = [size for size in SWEEPS if any(row["sweep"] == size for row in rows)]
    figure = Figure(figsize=(3.4 * len(sweeps) + 1.6, 3.2))
    for axes, size in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        x = "parameters" if size == "width" else "value"
        points = sorted((row for row in rows if row["sweep"] == size), key=lambda row: row[x])
        for key in DRAWN:
            axes.plot([row[x] for row in points], [row[key] for row in points], marker="o", markersize=3,
                      label=COLUMNS[key])  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([row[x] for row in points], [f"{row[x]:.3g}" if size == "width" else row[x] for row in points])
        axes.minorticks_off()
        axes.set_xlabel("parameters (by width)" if size == "width" else size)
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    return _save(figure, directory / "growth.svg")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("grid", "growth"))
    parser.add_argument("lines", type=Path, help="file with one JSON object per line")
    parser.add_argument("directory", type=Path, help="where the pictures go")
    args = parser.parse_args()
    rows = read_lines(args.lines)
    drawn = draw_grid(rows, args.directory) if args.kind == "grid" else [draw_growth(rows, args.directory)]
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main()
