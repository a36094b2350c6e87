"""What can be wrong with a recording or an artifact."""

from __future__ import annotations

__all__ = ["ArtifactError"]


class ArtifactError(RuntimeError):
    """A recording or an artifact is damaged, incomplete, of another format, or of another model.

    Args:
        message: Where, what was found, what was expected.
        file: The name of the file that it is about, where it is about one.
        chunk: Which of its chunks is damaged, counted from 0.

    Attributes:
        file: As given.
        chunk: As given.
    """

    def __init__(self, message: str, file: str | None = None, chunk: int | None = None) -> None:
        super().__init__(message)
        self.file, self.chunk = file, chunk
