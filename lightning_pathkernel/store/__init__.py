"""Files: atomic publication, tensors as safetensors, the manifest, and what lies behind URLs."""

from lightning_pathkernel.store.checked_file import CHUNK, CheckedFile
from lightning_pathkernel.store.chords import facts_of, read_group, read_tensors, tensors_of, write_group
from lightning_pathkernel.store.errors import ArtifactError, StoreError
from lightning_pathkernel.store.lock import HeldError, WriterLock
from lightning_pathkernel.store.manifest import (
    CONSTANTS,
    MANIFEST,
    Manifest,
    file_table,
    read_manifest,
)
from lightning_pathkernel.store.migrations import FORMAT, FORMAT_VERSION
from lightning_pathkernel.store.publish import (
    fsync_directory,
    make_directory,
    publish,
    publish_json,
    publish_tensors,
    remove_temporaries,
    sha256_of,
    taken_back,
)
from lightning_pathkernel.store.remote import LocalCopy, download, is_url, local_copy, upload
from lightning_pathkernel.store.segments import Segment, SegmentHeader, read_segment, segment_name, write_segment
from lightning_pathkernel.store.tensor_file import TensorEntry, TensorFile
from lightning_pathkernel.store.trees import pack_tree, unpack_tree
from lightning_pathkernel.store.verification import verify
from lightning_pathkernel.store.writer import Head, SegmentWriter, Stamp

__all__ = [
    "CHUNK",
    "CONSTANTS",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "ArtifactError",
    "CheckedFile",
    "Head",
    "HeldError",
    "LocalCopy",
    "Manifest",
    "Segment",
    "SegmentHeader",
    "SegmentWriter",
    "Stamp",
    "StoreError",
    "TensorEntry",
    "TensorFile",
    "WriterLock",
    "download",
    "facts_of",
    "file_table",
    "fsync_directory",
    "is_url",
    "local_copy",
    "make_directory",
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
    "taken_back",
    "tensors_of",
    "unpack_tree",
    "upload",
    "verify",
    "write_group",
    "write_segment",
]
