"""`pathkernel export`: a recording, finished or interrupted, becomes a machine."""

from __future__ import annotations

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told
from lightning_pathkernel.exporter import KernelMachineExporter

__all__ = ["export"]


def export(recording: str, out: str, row_bits: int = 16) -> int:
    """Make a machine of a recording, broken off or not.

    Args:
        recording: The recording's directory: what the callback wrote, `DIRPATH/recording`.
        out: Where the artifact is to be: a directory that does not exist or is empty, or an fsspec URL.
        row_bits: Bits of each number kept of an example: 16, or 8 for half the bytes.

    Returns:
        The exit status: 0, or 1 if it could not be exported; then nothing is at OUT.
    """
    try:
        made = KernelMachineExporter(recording).export(out, row_bits=row_bits)
    except (store.ArtifactError, OSError) as error:
        return answer({}, told(recording, error), False, status=1)
    return answer({}, f"{made}", False)
