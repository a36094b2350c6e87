"""How a command says what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["answer", "printable", "told"]


def answer(facts: Mapping[str, Any], text: str, as_json: bool, status: int = 0) -> int:
    """Print a command's result.

    Args:
        facts: For programs.
        text: For people; goes to standard error where the status is not 0.
        as_json: Which of them is wanted.
        status: The exit status.

    Returns:
        ``status``.
    """
    if as_json:
        print(json.dumps(facts, sort_keys=True))
    else:
        print(printable(text), file=sys.stderr if status else sys.stdout)
    return status


def told(where: str, error: Exception) -> str:
    """An error with the place that it is about, once."""
    return str(error) if where in str(error) else f"{where}: {error}"


def printable(text: str) -> str:
    """Text that may hold names from a stranger's file, with nothing that steers a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
