"""Exports of recordings as an interruption left them."""

from __future__ import annotations

from pathlib import Path

from lightning_pathkernel import ArtifactError, KernelMachineExporter, verify

__all__ = ["export"]

_NOTHING_YET = ("no closed chord", "it has no recording.json", "segment-000000.safetensors is missing")
"""What is said of a recording that was interrupted before there was anything in it."""


def export(recorded: Path, out: Path) -> str:
    """Export what there is and verify it.

    Returns:
        What came of it: an artifact, or the reason that there was nothing to export.

    Raises:
        ArtifactError: If the recording is damaged.
    """
    try:
        verify(KernelMachineExporter(recorded).export(out))
    except ArtifactError as error:
        if any(text in str(error) for text in _NOTHING_YET):
            return str(error)
        raise
    return "exported"
