"""What can be wrong with a recording or an artifact."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["ArtifactError", "StoreError"]


class ArtifactError(RuntimeError):
    """A recording or an artifact is damaged, incomplete, of another format, or of another model.

    Args:
        message: Where, what was found, what was expected.
        file: The name of the file that it is about, where it is about one.
        chunk: Which of its chunks is damaged, counted from 0.

    Attributes:
        file: As given.
        chunk: As given.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel import ArtifactError, verify
        >>> try:
        ...     verify(tempfile.mkdtemp())  # an empty directory
        ... except ArtifactError as error:
        ...     print("no manifest" if "manifest.json" in str(error) else error)
        no manifest
    """

    def __init__(self, message: str, file: str | None = None, chunk: int | None = None) -> None:
        super().__init__(message)
        self.file, self.chunk = file, chunk


class StoreError(OSError):
    """A recording could not be written; what was written before is there and exportable."""

    @classmethod
    def of(cls, error: BaseException, directory: Path, segments: int) -> StoreError:
        """The error to raise for another one.

        Args:
            error: What went wrong.
            directory: Of the segments.
            segments: How many of them were written before.

        Returns:
            The error, with its cause and its number.
        """
        number = getattr(error, "errno", None) or errno.EIO
        made = cls(
            number,
            f"the recording cannot be written any further: {error}. {segments} segments are safe in {directory}; make "
            "room, and resume from a checkpoint, or export what is there: KernelMachineExporter(recording).export(out)",
        )
        made.__cause__ = error
        return made
