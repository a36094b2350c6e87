"""Geometry of the page's charts, in percent of the plot: the template draws, this computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_pathkernel.report.history import METRICS
from lightning_pathkernel.report.numbers import percent, plain

__all__ = ["Chart", "Line", "Tick", "bar_chart", "line_chart", "nice_ticks", "value_text"]

Entries = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in percent and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: The metric.
        label: Its name for people.
        path: SVG path in a 1000 x 1000 box; broken where a value is missing.
        dots: SVG path of zero-length strokes at the points.
        last: The last value, as text.
        texts: Every value as text, one per step.
    """

    name: str
    label: str
    path: str
    dots: str
    last: str
    texts: list[str]


@dataclass(frozen=True)
class Chart:
    """A small chart.

    Attributes:
        key: Its id in the page.
        title: Its heading.
        meaning: One line below the heading.
        lines: Its curves.
        bars: Its bars: left, width and height in percent.
        x_ticks: Marks of the horizontal axis.
        y_ticks: Marks of the vertical axis.
        at: Every step's place in percent.
        steps: The steps.
        below: Values below the lower end of the axis, drawn at it, as a note.
        summary: The chart in words.
    """

    key: str
    title: str
    meaning: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    at: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    below: str = ""
    summary: str = ""


def nice_ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """About ``count`` round numbers (``whole`` ones) from ``low`` to ``high``, which they may leave out at the ends."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _tick_text(value: float, step: float) -> str:
    decimals = max(0, min(8, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 2
    if step > 0 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return plain(value, decimals) if abs(value) < 1e5 else f"{value:.0e}".replace("e+0", "e")


def _ticks(low: float, high: float, whole: bool = False) -> list[Tick]:
    values = nice_ticks(low, high, whole=whole)
    step = values[1] - values[0] if len(values) > 1 else max(abs(values[0]) if values else 1.0, 1e-8)
    return [Tick(_place(v, low, high), _tick_text(v, step)) for v in values]


def _place(value: float, low: float, high: float) -> float:
    return 50.0 if high <= low else 100 * min(1.0, max(0.0, (value - low) / (high - low)))


def value_text(name: str, value: float | None) -> str:
    """A metric's value as the page writes it."""
    known = METRICS.get(name)
    return percent(value) if known is not None and known.share else plain(value, 4)


def line_chart(
    key: str, title: str, meaning: str, entries: Entries, names: Sequence[str], top: float | None = None,
    floor: float | None = None, until: float | None = None,
) -> Chart | None:  # fmt: skip
    """Curves of some metrics over the optimiser's steps.

    Args:
        key: Id of the chart in the page.
        title: Heading.
        meaning: One line below it.
        entries: The history, tidy.
        names: Metrics to draw; those that were never logged are left out.
        top: Upper end of the vertical axis; None for the largest value, and the lower end is then 0.
        floor: Least lower end where there is a ``top``: values below it are drawn at it and counted in a note.
        until: Right end of the horizontal axis; None for the last entry.

    Returns:
        The chart, or None where none of the metrics has a value.
    """
    found = {n: [e.get(n) for e in entries] for n in names if any(n in e for e in entries)}
    values = [v for column in found.values() for v in column if v is not None]
    if not values:
        return None
    if top is None:
        low, high = min(0.0, *values), max(*values, 0.0) * 1.05 or 1.0
    else:
        least = min(values)
        low = max(floor if floor is not None else least, least - 0.06 * max(top - least, 1e-3))
        high = max(top, *values)
    steps = [e["step"] or 0.0 for e in entries]
    right = max([*steps, until or 0.0, 1.0])
    at = [_place(s, 0, right) for s in steps]
    lines = [_line(n, column, at, low, high) for n, column in found.items()]
    beneath = sum(v < low for v in values)
    below = f"{beneath} of {len(values)} values lie below {plain(low, 2)} and are drawn there." if beneath else ""
    y_ticks = _percent_ticks(low, high) if _shares(found) else _ticks(low, high)
    summary = f"{title} at {len(steps)} steps. " + " ".join(f"{line.label}: last {line.last}." for line in lines)
    return Chart(
        key,
        title,
        meaning,
        lines,
        _ticks(0, right, whole=True),
        y_ticks,
        at,
        [int(s) for s in steps],
        below=below,
        summary=summary,
    )


def _line(name: str, column: Sequence[float | None], at: Sequence[float], low: float, high: float) -> Line:
    path, dots, pen = [], [], "M"
    for x, value in zip(at, column, strict=True):
        if value is None:
            pen = "M"
            continue
        point = f"{10 * x:.1f} {1000 - 10 * _place(value, low, high):.1f}"
        path.append(pen + point)
        dots.append(f"M{point}h0")
        pen = "L"
    known = METRICS.get(name)
    texts = [value_text(name, v) for v in column]
    last = next((t for t, v in zip(texts[::-1], column[::-1], strict=True) if v is not None), texts[-1])
    return Line(name, known.label if known else name, "".join(path), "".join(dots), last, texts)


def bar_chart(key: str, title: str, meaning: str, edges: Sequence[tuple[int, int]], heights: Sequence[float]) -> Chart:
    """Bars over stretches of steps.

    Args:
        key: Id of the chart in the page.
        title: Heading.
        meaning: One line below it.
        edges: First and last step of each bar.
        heights: Its height, not negative.

    Returns:
        The chart.
    """
    right = max([last for _, last in edges] + [1])
    finite = [h if math.isfinite(h) else 0.0 for h in heights]
    high = max([*finite, 0.0]) * 1.05 or 1.0
    bars = [
        (_place(first, 0, right), max(0.3, _place(last, 0, right) - _place(first, 0, right)), _place(h, 0, high))
        for (first, last), h in zip(edges, finite, strict=True)
    ]
    longest = max(range(len(finite)), key=finite.__getitem__)
    summary = (
        f"{title}: {len(bars)} chords; the weights moved most between steps {edges[longest][0]} and "
        f"{edges[longest][1]}, by {percent(heights[longest])}."
    )
    return Chart(
        key, title, meaning, [], _ticks(0, right, whole=True), _percent_ticks(0, high), bars=bars, summary=summary
    )


def _percent_ticks(low: float, high: float) -> list[Tick]:
    return [Tick(t.at, f"{t.text}\N{NO-BREAK SPACE}%") for t in _ticks(100 * low, 100 * high)]


def _shares(names: Iterable[str]) -> bool:
    return all(name in METRICS and METRICS[name].share for name in names)
