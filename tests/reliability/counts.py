"""How much of each campaign runs: the full figure with `-m slow` and by the command, a sample in the quick suite."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COUNTS", "Count"]


@dataclass(frozen=True)
class Count:
    """Of one campaign; 0 means everything there is."""

    sample: int
    full: int


COUNTS = {
    "kills": Count(5, 1000),
    "kills-two-ranks": Count(2, 100),
    "faults-recording": Count(4, 0),
    "faults-stopping": Count(4, 0),
    "faults-exporting": Count(8, 0),
    "faults-resuming": Count(3, 0),
    "crashes": Count(24, 0),
    "full-disk": Count(2, 20),
    "flips": Count(45, 10_000),
    "truncations": Count(45, 10_000),
    "hostile": Count(12, 0),
    "fuzz": Count(2_000, 100_000),
    "fuzz-atheris": Count(0, 1_000_000),
    "audit": Count(1, 1),
    "readers": Count(60, 1000),
    "writers": Count(2, 20),
}
