"""Files: atomic publication, tensors as safetensors, the manifest, and what lies behind URLs."""

from lightning_pathkernel.store.checked_file import CHUNK, CheckedFile
from lightning_pathkernel.store.chords import facts_of, read_group, read_tensors, tensors_of, write_group
from lightning_pathkernel.store.errors import ArtifactError
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
    publish,
    publish_json,
    publish_tensors,
    sha256_of,
)
from lightning_pathkernel.store.remote import LocalCopy, download, is_url, local_copy, upload
from lightning_pathkernel.store.tensor_file import TensorEntry, TensorFile
from lightning_pathkernel.store.verification import verify

__all__ = [
    "CHUNK",
    "CONSTANTS",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "ArtifactError",
    "CheckedFile",
    "LocalCopy",
    "Manifest",
    "TensorEntry",
    "TensorFile",
    "download",
    "facts_of",
    "file_table",
    "fsync_directory",
    "is_url",
    "local_copy",
    "publish",
    "publish_json",
    "publish_tensors",
    "read_group",
    "read_manifest",
    "read_tensors",
    "sha256_of",
    "tensors_of",
    "upload",
    "verify",
    "write_group",
]
