"""Which classes speak for which: contributions of training classes to the outputs explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_pathkernel.report.examples import Label
from lightning_pathkernel.report.numbers import decimals_for, signed
from lightning_pathkernel.report.png import data_uri

__all__ = ["ClassTable", "HeatMap", "class_table", "heat_map"]

CELLS_WRITTEN = 20
"""Up to this many classes the heat map is a table of numbers; beyond, a picture and its strongest cells."""
STRONGEST = 20
_FOR, _AGAINST = (27, 108, 168), (192, 86, 16)


@dataclass(frozen=True)
class ClassTable:
    """Mean contribution of each training class to each class explained.

    Attributes:
        rows: Classes explained, by name.
        columns: Classes of the training examples, by name.
        values: Mean over the queries of a row's class of the summed contributions of a column's class, ``[R, C]``.
    """

    rows: list[str]
    columns: list[str]
    values: NDArray[np.float64]


def class_table(
    sums: NDArray[np.float64], targets: Sequence[int], labels: Sequence[Label], names: Sequence[str] | None
) -> ClassTable:
    """Average the queries' sums over the classes that were explained.

    Args:
        sums: Each query's contributions summed over the examples of each class, ``[Q, C]``; classes ascending.
        targets: The class explained of each query.
        labels: Labels of all training examples.
        names: Names of the classes, by number; None for the numbers.

    Returns:
        The table.
    """
    explained, classes = sorted(set(targets)), ordered(labels)
    where = np.asarray(targets)
    values = np.stack([sums[where == k].mean(0) for k in explained])
    return ClassTable([class_name(k, names) for k in explained], [class_name(c, names) for c in classes], values)


def ordered(labels: Sequence[Label]) -> list[Label]:
    """The classes that occur, ascending; numbers before strings."""
    return sorted(set(labels), key=lambda c: (isinstance(c, str), c if not isinstance(c, str) else 0, str(c)))


def class_name(label: Label | None, names: Sequence[str] | None) -> str:
    """A class by its name, or its number where it has none."""
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return str(names[label])
    return "" if label is None else f"{label:.4g}" if isinstance(label, float) else str(label)


@dataclass(frozen=True)
class Cell:
    """A cell of the heat map: its value, its text, and its shade from 0 to 1 with the sign's name."""

    value: float
    text: str
    shade: float
    sign: str


@dataclass(frozen=True)
class HeatMap:
    """The table of classes, ready for the page.

    Attributes:
        table: What it shows.
        cells: Its cells, row by row; empty where there are too many classes to write them.
        picture: The same as a picture's data URI, where there are.
        strongest: Row, column and cell of the largest values, where there are.
        largest: The largest magnitude, as text.
    """

    table: ClassTable
    cells: list[list[Cell]]
    picture: str
    strongest: list[tuple[str, str, Cell]]
    largest: str


def heat_map(table: ClassTable) -> HeatMap:
    """Shades and texts of a table of classes."""
    values = np.nan_to_num(table.values, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(np.abs(values).max(initial=0.0))
    decimals = max(0, decimals_for([largest]) - 1)
    cells = [[_cell(float(v), largest, decimals) for v in row] for row in table.values]
    if max(values.shape) <= CELLS_WRITTEN:
        return HeatMap(table, cells, "", [], signed(largest, decimals))
    order = np.argsort(-np.abs(values), axis=None)[:STRONGEST]
    places = [divmod(int(k), values.shape[1]) for k in order]
    strongest = [(table.rows[r], table.columns[c], cells[r][c]) for r, c in places]
    return HeatMap(table, [], data_uri(_picture(values, largest)), strongest, signed(largest, decimals))


def _cell(value: float, largest: float, decimals: int) -> Cell:
    shade = min(1.0, abs(value) / largest) if largest and np.isfinite(value) else 0.0
    return Cell(value, signed(value, decimals), round(shade, 3), "for" if value > 0 else "against")


def _picture(values: NDArray[np.float64], largest: float) -> NDArray[np.uint8]:
    """Signs as colours and magnitudes as opacity, so that 0 is the page's own ground in either theme."""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where((values > 0)[..., None], _FOR, _AGAINST)
    pixels[..., 3] = np.round(255 * np.abs(values) / (largest or 1.0))
    return pixels


def sums_by_class(contributions: Tensor, codes: Tensor, classes: int) -> Tensor:
    """Contributions ``[Q, N]`` summed over the examples of each class, ``[Q, classes]`` in float64.

    Args:
        contributions: Of all examples.
        codes: Each example's class, ``[N]``, from 0 on.
        classes: How many there are.

    Returns:
        The sums.
    """
    out = contributions.new_zeros(len(contributions), classes).double()
    return out.index_add_(1, codes, contributions.double())
