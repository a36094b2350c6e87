"""A query's ledger as a waterfall, from the initial model by way of b(x) to the network's output."""

from __future__ import annotations

from collections.abc import Mapping
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


def waterfall(ledger: Mapping[str, float], positive: float, negative: float) -> tuple[list[Step], float]:
    """The rows of one query's waterfall.

    Args:
        ledger: Its terms, of `lightning_pathkernel.ledger.LEDGER_TERMS`.
        positive: Sum of its positive contributions.
        negative: Sum of its negative ones; both together are the ledger's ``examples``.

    Returns:
        The rows, and where 0 lies, in percent.
    """
    values = {**ledger, "for": positive, "against": negative}
    running, spans = 0.0, []
    for key in LEDGER_WORDS:
        if key in _TOTALS:
            spans.append((key, 0.0, running))
        else:
            spans.append((key, running, running + values[key]))
            running += values[key]
    ends = [0.0, *(end for _, *pair in spans for end in pair)]
    low, high = min(ends), max(ends)
    scale = 100 / (high - low) if high > low else 0.0
    decimals = decimals_for([ledger["examples"], *(end for key, _, end in spans if key in _TOTALS)])
    return [_step(key, a, b, low, scale, decimals) for key, a, b in spans], -low * scale


def _step(key: str, start: float, end: float, low: float, scale: float, decimals: int) -> Step:
    total, value = key in _TOTALS, end - start
    sign = "total" if total else "for" if value > 0 else "against" if value < 0 else "zero"
    text = plain(value, decimals) if total else signed(value, decimals)
    left, width = (min(start, end) - low) * scale, abs(value) * scale
    return Step(key, LEDGER_WORDS[key][0], value, text, total, sign, left, width, (end - low) * scale)
