"""What can be wrong with a recording or an artifact."""

from __future__ import annotations

__all__ = ["ArtifactError"]


class ArtifactError(RuntimeError):
    """A recording or an artifact is damaged, incomplete, of another format, or of another model."""
