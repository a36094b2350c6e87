"""How long recording takes, and what it is told of autocast."""

from __future__ import annotations

import time

import torch

__all__ = ["Clock"]


class Clock:
    """Our own work: on the clock, and in full precision, for a step by hand may be within the step's autocast.

    Args:
        device: Type of device that the fit runs on.

    Attributes:
        seconds: Time spent so far, wall clock.
    """

    def __init__(self, device: str) -> None:
        self.seconds = 0.0
        self._device = device
        self._started = 0.0
        self._full: torch.autocast | None = None

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if torch.is_autocast_enabled(self._device):  # making the context costs more than most of what we do
            self._full = torch.autocast(self._device, enabled=False)
            self._full.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._full is not None:
            self._full.__exit__(*error)
            self._full = None
        self.seconds += time.perf_counter() - self._started
