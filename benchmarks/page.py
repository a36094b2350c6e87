"""What every measurement says of itself, and its place in a page of docs/."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["command", "conditions", "emit", "read_lines", "table"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def conditions(*packages: str) -> str:
    """Versions, cores and load under which a figure was taken.

    Args:
        packages: Names of the distributions that were compared with; one that is not installed is said to be missing.

    Returns:
        One sentence.
    """
    found = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{', '.join(found)}; {cores} of {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f} when it was written."
    )


def command(module: str, arguments: Sequence[str]) -> str:
    """What to run to measure again: the arguments as they were given, without files to write and without paths."""
    shown, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--docs", "--json"):
            shown.append("DIRECTORY" if Path(argument).is_dir() else shlex.quote(argument))
        skip = argument in ("--docs", "--json")
    return " ".join([f"python -m benchmarks.{module}", *shown])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def emit(section: str, command: str, lines: Sequence[str], docs: Path | None) -> None:
    """Print a measurement and, where a page is given, put it into its section.

    A section lies between ``<!-- section -->`` and ``<!-- /section -->``: what stands there is replaced, what was
    written around it stays. A page without the section gets it at its end.

    Args:
        section: Name of the section.
        command: What to run to measure again.
        lines: Markdown.
        docs: The page, or None.
    """
    text = "\n".join([f"    {command}", "", *lines])
    print(text, flush=True)
    if docs is None:
        return
    first, last = f"<!-- {section} -->", f"<!-- /{section} -->"
    page = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    block = f"{first}\n\n{text}\n\n{last}"
    before, found, rest = page.partition(first)
    page = before + block + rest.partition(last)[2] if found else f"{page.rstrip()}\n\n{block}\n".lstrip()
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page, encoding="utf-8")
