"""Files: atomic publication, chords as safetensors, the manifest."""

from lightning_pathkernel.store.chords import read_group, read_tensors, write_group
from lightning_pathkernel.store.errors import ArtifactError
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
    sha256_of,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "ArtifactError",
    "file_table",
    "fsync_directory",
    "publish",
    "publish_json",
    "publish_tensors",
    "read_group",
    "read_manifest",
    "read_tensors",
    "sha256_of",
    "verify",
    "write_group",
]
