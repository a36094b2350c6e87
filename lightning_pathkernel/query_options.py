"""How a machine goes about its answers: the same for every question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_pathkernel.progress import Progress

__all__ = ["QueryOptions"]


@dataclass(frozen=True)
class QueryOptions:
    """How questions are answered; `KernelMachine` explains the fields.

    Raises:
        ValueError: If a number is not positive.
    """

    rtol: float | None = None
    quadrature_points: int = 4
    chunk_size: int = 256
    example_chunk: int | None = None
    progress: Progress = None

    def __post_init__(self) -> None:
        if self.quadrature_points < 1 or (self.rtol is not None and self.rtol <= 0):
            raise ValueError(
                f"quadrature_points and rtol must be positive, found {self.quadrature_points} and {self.rtol}"
            )
        for name in ("chunk_size", "example_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")

    def arguments(self) -> dict[str, Any]:
        """The fields by name, as a machine takes them."""
        return dict(vars(self))
