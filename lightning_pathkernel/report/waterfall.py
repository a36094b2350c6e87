"""A query's ledger as a waterfall, from the initial model by way of b(x) to the network's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_pathkernel.report.numbers import decimals_for, plain, signed

__all__ = ["LEDGER_WORDS", "Step", "waterfall"]

LEDGER_WORDS = {
    "initial": ("Initial model", "the output before training"),
    "decay": ("Weight decay", "what shrinking the weights did to it"),
    "buffers": ("Buffers", "what running statistics, such as batch norm's, did to it"),
    "bias": ("Bias b(x)", "the three above: what no training example is asked for"),
    "for": ("Examples for", "sum of all positive contributions"),
    "against": ("Examples against", "sum of all negative contributions"),
    "machine": ("Kernel machine", "bias and all examples: what predict() returns"),
    "sketch": ("Sketch", "examples' influence lost by keeping few numbers of each"),
    "quadrature": ("Quadrature", "lost by integrating along the path with few points"),
    "unattributed": ("Unattributed", "moved the weights, but through no example"),
    "network": ("Network", "the output of the trained network itself"),
}
EXAMPLES = "Examples"
_TOTALS = ("bias", "machine", "network")


@dataclass(frozen=True)
class Step:
    """One row of a waterfall.

    Attributes:
        key: Which, of `LEDGER_WORDS`.
        label: Its name.
        value: What it adds; of a total, the total.
        text: The same as text.
        total: Whether it is a total.
        sign: ``for`` or ``against``, ``total``, or ``zero``.
        left: Left end of its bar, in percent.
        width: Width of its bar, in percent.
        end: Where the running total stands after it, in percent.
        cut: Whether its bar goes on beyond the right end of the scale.
    """

    key: str
    label: str
    value: float
    text: str
    total: bool
    sign: str
    left: float
    width: float
    end: float
    cut: bool


def waterfall(
    ledger: Mapping[str, float], positive: float | None = None, negative: float | None = None
) -> tuple[list[Step], float]:
    """The rows of one query's waterfall.

    Args:
        ledger: Its terms, of `lightning_pathkernel.ledger.LEDGER_TERMS`.
        positive: Sum of its positive contributions; None for one row of examples for and against together.
        negative: Sum of its negative ones; both together are the ledger's ``examples``.

    Returns:
        The rows, and where 0 lies, in percent.
    """
    split = positive is not None and negative is not None
    values = {**ledger, "for": ledger["examples"] if positive is None else positive, "against": negative or 0.0}
    values = {name: value if math.isfinite(value) else math.nan for name, value in values.items()}
    running, spans = 0.0, list[tuple[str, float, float]]()
    for key in LEDGER_WORDS:
        if key == "against" and not split:
            continue
        if key in _TOTALS:
            spans.append((key, 0.0, running))
        else:
            spans.append((key, running, running + values[key]))
            running += values[key]
    low, high = _scale(spans)
    scale = 100 / (high - low) if high > low else 0.0
    decimals = decimals_for([ledger["examples"], *(end for key, _, end in spans if key in _TOTALS)])
    words = {key: word for key, (word, _) in LEDGER_WORDS.items()} | ({} if split else {"for": EXAMPLES})
    return [_step(key, words[key], a, b, (low, high, scale), decimals) for key, a, b in spans], -low * scale


def _scale(spans: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """Ends of the scale: where examples for and against dwarf all else, their bars are cut."""
    ends = {key: (start, end) for key, start, end in spans}
    every = [0.0, *(place for pair in ends.values() for place in pair)]
    if not all(map(math.isfinite, every)):
        return 0.0, 0.0
    if "against" not in ends:
        return min(every), max(every)
    rest = [0.0, ends["for"][0], ends["against"][1]]
    rest += [place for key, pair in ends.items() if key not in ("for", "against") for place in pair]
    low, high, room = min(every), max(every), max(rest) - min(rest)
    return low, max(rest) + 0.4 * room if high - low > 3 * room > 0 else high


def _step(key: str, label: str, start: float, end: float, axis: tuple[float, float, float], decimals: int) -> Step:
    low, high, scale = axis
    total, value = key in _TOTALS, end - start
    text = plain(value, decimals) if total else signed(value, decimals)
    shown = bool(text.strip("0.\N{MINUS SIGN}+"))
    sign = "total" if total else "zero" if not shown else "for" if value > 0 else "against"
    spots = (min(start, end), max(start, end), end)
    left, right, place = ((min(high, each) - low) * scale if scale else 0.0 for each in spots)
    return Step(key, label, value, text, total, sign, left, right - left, place, max(start, end) > high)
