"""A bar on standard error while a question takes long; standard output is never written to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

__all__ = ["Advance", "Progress", "is_shown", "progress_bar", "style_of"]

Progress = bool | Literal["tqdm", "rich"] | None
"""Whether there is a bar: None where somebody may be looking and it takes long; True, or a kind: always."""
Advance = Callable[[float], object]
"""Called with the work that was done since the last call."""
DELAY = 2.0
"""Seconds after which a bar shows that nobody asked for."""
_LOOK = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def style_of(module: nn.Module) -> Literal["tqdm", "rich"]:
    """The kind of bar that a module's Trainer has, as far as the module knows one; tqdm otherwise."""
    trainer = module.__dict__.get("_trainer")
    kinds = type(getattr(trainer, "progress_bar_callback", None)).__mro__
    return "rich" if any(kind.__name__ == "RichProgressBar" for kind in kinds) else "tqdm"


def is_shown(progress: Progress) -> bool:
    """Whether there is a bar: where nobody decided, if standard error is a terminal or the process a notebook's."""
    if progress is None:
        return sys.stderr.isatty() or any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
    return progress is not False


@contextmanager
def progress_bar(
    text: str, total: float | None, progress: Progress, style: Literal["tqdm", "rich"]
) -> Iterator[Advance]:
    """A bar while its block runs, taken away afterwards.

    Args:
        text: What is done.
        total: All the work there is; None where nobody knows.
        progress: Whether there is a bar, and of which kind.
        style: Its kind where ``progress`` does not name one.

    Yields:
        Moves the bar on.
    """
    if not is_shown(progress):
        yield lambda amount: None
        return
    kind = progress if isinstance(progress, str) else style
    with (_rich if kind == "rich" else _tqdm)(text, total, DELAY if progress is None else 0.0) as advance:
        yield advance


@contextmanager
def _tqdm(text: str, total: float | None, delay: float) -> Iterator[Advance]:
    with tqdm(desc=text, total=total, delay=delay, leave=False, file=sys.stderr, bar_format=_LOOK) as bar:
        yield bar.update


@contextmanager
def _rich(text: str, total: float | None, delay: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import Progress as RichBar

    bar = RichBar(console=Console(stderr=True), transient=True)
    task, begun, shown = bar.add_task(text, total=total), time.monotonic(), False

    def advance(amount: float) -> Any:
        nonlocal shown
        bar.advance(task, amount)
        if not shown and time.monotonic() - begun >= delay:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        bar.stop()
