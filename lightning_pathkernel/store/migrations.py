"""Versions of the artifact's format: which of them this package reads, and what makes an old manifest a new one.

A version is ``[major, minor]``. A new minor version adds keys, which older readers of the same major version do not
know and ignore; what they must not ignore is named in ``required_features``. Every step from one version to the next
stands here, and nothing else in the package knows of old versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lightning_pathkernel.store.errors import ArtifactError

__all__ = ["FEATURES", "FORMAT", "FORMAT_VERSION", "current"]

FORMAT = "lightning_pathkernel.machine"
FORMAT_VERSION = [1, 1]
FEATURES: frozenset[str] = frozenset()
"""Required features that this version has."""

Manifest = dict[str, Any]


def _from_1_0(manifest: Manifest) -> Manifest:
    """1.0 had a sha256 of every file, and no checksums of chunks: its files are checked whole when first touched."""
    return {**manifest, "libraries": {"lightning_pathkernel": "0.1.0", **_table(manifest.get("libraries"))}}


_STEPS: dict[tuple[int, int], tuple[tuple[int, int], Callable[[Manifest], Manifest]]] = {(1, 0): ((1, 1), _from_1_0)}
"""Version -> the next one, and what leads there."""


def current(manifest: Manifest) -> Manifest:
    """A manifest of any version that can be read, as one of this version.

    Args:
        manifest: As it was read, with its ``format``, ``version`` and ``required_features``.

    Returns:
        The manifest; keys that this version does not know are kept and mean nothing.

    Raises:
        ArtifactError: If it is of another format, of a major version that this one does not read, or requires a feature
            that this one does not have.
    """
    version = manifest["version"]
    if not isinstance(version, list) or len(version) != 2 or not all(type(part) is int for part in version):
        raise ArtifactError(f"manifest.json: malformed: version {str(version)[:40]!r}, expected [major, minor]")
    if manifest["format"] != FORMAT or version[0] != FORMAT_VERSION[0] or version[1] < 0:
        raise ArtifactError(
            f"manifest.json: format {str(manifest['format'])[:80]!r} {version}, this version reads {FORMAT!r} "
            f"{FORMAT_VERSION[0]}.x{_advice(manifest)}"
        )
    at = version[0], version[1]
    while at in _STEPS:
        at, step = _STEPS[at]
        manifest = step(manifest)
    required = manifest.get("required_features")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ArtifactError("manifest.json: malformed: required_features is no list of names")
    unknown = sorted(set(required) - FEATURES)
    if unknown:
        names = ", ".join(repr(name[:80]) for name in unknown[:8])
        raise ArtifactError(
            f"manifest.json: malformed or newer: required_features {names}, which this version does not have"
            f"{_advice(manifest)}"
        )
    return manifest


def _advice(manifest: Manifest) -> str:
    """Which version of the package reads it, as far as the manifest says."""
    if manifest["format"] != FORMAT:
        return ": it is no kernel machine of this package"
    writer = _table(manifest.get("libraries")).get("lightning_pathkernel")
    if isinstance(writer, str) and re.fullmatch(r"[0-9A-Za-z.+!-]{1,40}", writer):
        return f": install lightning_pathkernel {writer}, which wrote it, or a newer version"
    return ": install the version of lightning_pathkernel that wrote it, or a newer one"


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
