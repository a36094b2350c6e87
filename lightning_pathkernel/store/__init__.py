"""Files: atomic publication, chords as safetensors, the manifest."""

from lightning_pathkernel.store.chords import read_group, read_tensors, write_group
from lightning_pathkernel.store.errors import ArtifactError, StoreError
from lightning_pathkernel.store.lock import HeldError, WriterLock
from lightning_pathkernel.store.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    file_table,
    read_manifest,
    verify,
)
from lightning_pathkernel.store.publish import (
    fsync_directory,
    publish,
    publish_json,
    publish_tensors,
    remove_temporaries,
    sha256_of,
)
from lightning_pathkernel.store.segments import Segment, SegmentHeader, read_segment, segment_name, write_segment
from lightning_pathkernel.store.trees import pack_tree, unpack_tree
from lightning_pathkernel.store.writer import Head, SegmentWriter, Stamp

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "ArtifactError",
    "Head",
    "HeldError",
    "Segment",
    "SegmentHeader",
    "SegmentWriter",
    "Stamp",
    "StoreError",
    "WriterLock",
    "file_table",
    "fsync_directory",
    "pack_tree",
    "publish",
    "publish_json",
    "publish_tensors",
    "read_group",
    "read_manifest",
    "read_segment",
    "read_tensors",
    "remove_temporaries",
    "segment_name",
    "sha256_of",
    "unpack_tree",
    "verify",
    "write_group",
    "write_segment",
]
