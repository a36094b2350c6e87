"""Numbers as the report writes them: signed, with a real minus, as many decimals as their scale deserves."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["MINUS", "decimals_for", "percent", "plain", "signed"]

MINUS = "\N{MINUS SIGN}"
NOT_FINITE = "not finite"


def decimals_for(values: Iterable[float]) -> int:
    """Decimals with which the largest of some values has four significant digits, between 0 and 12."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return 3 if largest == 0 else min(12, max(0, 3 - math.floor(math.log10(largest))))


def plain(value: float | None, decimals: int = 3) -> str:
    """A number with a real minus; ``not finite`` for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if value and abs(value) >= 1e7:
        return f"{value:.3e}".replace("-", MINUS)
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float | None, decimals: int = 3) -> str:
    """A number with its sign, except where it rounds to 0."""
    text = plain(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.") and text != NOT_FINITE else text


def percent(value: float | None) -> str:
    """A share in percent, with two significant digits below 10 %."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    scaled = 100 * value
    decimals = 0 if abs(scaled) >= 100 or scaled == 0 else 1 if abs(scaled) >= 1 else 2
    return f"{plain(scaled, decimals)}\N{NO-BREAK SPACE}%"
