"""The doors: functions that read files of others, each given bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

from lightning_pathkernel import ArtifactError
from lightning_pathkernel.chord_io import chord_of
from lightning_pathkernel.packed_io import Node, read_packed
from lightning_pathkernel.recording_reader import Recording
from lightning_pathkernel.recording_store import read_description
from lightning_pathkernel.store import CheckedFile, TensorFile, read_manifest, read_segment, unpack_tree
from lightning_pathkernel.store.manifest import parse_manifest

__all__ = ["DOORS", "Target"]

DOORS = ("manifest", "directory", "tensors", "chord", "next chord", "segment", "sealed segment", "description")
_CRC = re.compile(rb'^(.{8}\{"__metadata__":\{"crc32c":")[0-9a-f]{8}', re.DOTALL)


class Target:
    """Gives bytes to a door.

    Args:
        place: A directory in memory; files in it are overwritten.
        node: Weights and buffers at which the second chord begins.
    """

    def __init__(self, place: Path, node: Node) -> None:
        self.place, self.node = place, node
        (place / "artifact").mkdir()
        (place / "rank-0000").mkdir()

    def __call__(self, door: str, data: bytes) -> bool:
        """Whether the door let them in; what it raises, but `ArtifactError`, escapes."""
        try:
            getattr(self, f"_{door.replace(' ', '_')}")(data)
        except ArtifactError:
            return False
        return True

    def _put(self, name: str, data: bytes) -> Path:
        path = self.place / name
        path.write_bytes(data)
        return path

    def _manifest(self, data: bytes) -> None:
        parse_manifest(data)

    def _directory(self, data: bytes) -> None:
        self._put("artifact/manifest.json", data)
        read_manifest(self.place / "artifact")

    def _tensors(self, data: bytes) -> None:
        file = TensorFile(CheckedFile(self._put("x.safetensors", data)))
        for name in file.entries:
            file.get(name)
        file.file.close()

    def _chord(self, data: bytes) -> None:
        read_packed(self._put("x.safetensors", data), None)

    def _next_chord(self, data: bytes) -> None:
        read_packed(self._put("x.safetensors", data), self.node)

    def _segment(self, data: bytes) -> None:
        found = read_segment(self._put("rank-0000/segment-000001.safetensors", data))
        if "rows" in found.groups:
            chord_of("segment-000001", found.groups, found.header.facts)
        if "state" in found.groups:
            self._state(found.groups["state"])

    def _state(self, groups: dict[str, Tensor]) -> None:
        try:
            unpack_tree(groups)
        except ValueError as error:  # its readers make an ArtifactError of it
            raise ArtifactError(str(error)) from error

    def _sealed_segment(self, data: bytes) -> None:
        """Whoever made the change made the checksum too."""
        zeros = _CRC.sub(rb"\g<1>00000000", data)
        crc = f"{google_crc32c.value(zeros):08x}".encode()
        self._segment(_CRC.sub(rb"\g<1>" + crc, data))

    def _description(self, data: bytes) -> None:
        path = self._put("recording.json", data)
        read_description(path.parent)
        Recording(path.parent)


def node_of(tensors: dict[str, Tensor]) -> Node:
    """Where the second chord of a seed begins: weights and buffers of the first."""
    weights = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("start/")}
    buffers = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("end_buffers/")}
    return Node(weights, buffers)


def resealed(data: bytes) -> bytes:
    """A recording's description whose fingerprints fit what it says, where it says anything."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return json.dumps(found).encode()


torch.set_num_threads(1)
