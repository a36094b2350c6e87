"""`pathkernel export`: a recording, finished or interrupted, becomes a machine."""

from __future__ import annotations

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told
from lightning_pathkernel.exporter import KernelMachineExporter

__all__ = ["export"]


def export(recording: str, out: str, row_bits: int = 16) -> int:
    """Make a machine from a recording, finished or not.

    Args:
        recording: What the callback wrote in training: `DIRPATH/recording`.
        out: Where the machine is to be: a new or empty directory, or an fsspec URL.
        row_bits: Bits of each number kept of an example: 16, the default, or 8 for half the bytes.

    Returns:
        The exit status: 0, or 1 if it could not be exported; then nothing is at OUT.
    """
    try:
        made = KernelMachineExporter(recording).export(out, row_bits=row_bits)
    except (store.ArtifactError, OSError) as error:
        return answer({}, told(recording, error), False, status=1)
    return answer({}, f"{made}", False)
