"""The files of a recording: what its description says, which segment follows which, and what is set aside.

Laid out as docs/recording.md says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pathkernel.chord_io import rank_name
from lightning_pathkernel.store import ArtifactError, Segment, fsync_directory, read_segment, segment_name

__all__ = [
    "RECORDING",
    "check_link",
    "checked_chain",
    "read_description",
    "segments_of",
    "set_aside",
    "with_identity",
]

RECORDING = "recording.json"
FORMAT = "lightning_pathkernel.recording"
VERSION = [1, 0]
_LIMIT = 16 << 20
_NEEDED = {
    "format", "version", "run_id", "configuration", "configuration_sha256", "ranks", "module", "module_class",
    "optimizer", "settings",
}  # fmt: skip


def with_identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Add format, fingerprint of the configuration, and a run id that says what the run began as.

    The id is made of all that is described, first weights included, and of nothing else: no clock, no random number. So
    a run that was interrupted and one that was not have the same id, and two runs that begin alike too; what tells
    their segments apart is the chain of hashes.

    Args:
        description: JSON-able facts, with ``configuration``.

    Returns:
        The facts with those added.
    """
    found = {"format": FORMAT, "version": VERSION, **description}
    found["configuration_sha256"] = _digest(found["configuration"])
    return {**found, "run_id": _digest(found)[:32]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_description(directory: Path) -> tuple[dict[str, Any], str]:
    """The description of a recording, and the sha256 of its file.

    Args:
        directory: The recording.

    Returns:
        Both.

    Raises:
        ArtifactError: If there is none, or it is malformed or altered.
    """
    path = directory / RECORDING
    if not path.is_file():
        raise ArtifactError(f"{directory} is not a recording: it has no {RECORDING}")
    try:
        if path.stat().st_size > _LIMIT:
            raise ArtifactError(f"{RECORDING}: larger than {_LIMIT} bytes")
        data = path.read_bytes()
        found = json.loads(data)
        missing = _NEEDED - set(found)
        if not isinstance(found, dict) or missing:
            raise ArtifactError(f"{RECORDING}: malformed: {', '.join(sorted(missing)) or 'no table'} missing")
        if found["format"] != FORMAT or found["version"][0] != VERSION[0]:
            said = f"{found['format']!r} {found['version']}"
            raise ArtifactError(f"{RECORDING}: format {said}, this version reads {FORMAT!r} {VERSION[0]}.x")
        again = with_identity({k: v for k, v in found.items() if k not in ("configuration_sha256", "run_id")})
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ArtifactError(f"{RECORDING}: malformed: {error!r}") from error
    if again != found:
        raise ArtifactError(f"{RECORDING}: its run id is not that of what it says: damaged or altered")
    return found, hashlib.sha256(data).hexdigest()


def checked_chain(directory: Path, description: Mapping[str, Any], root: str, rank: int, count: int) -> list[Segment]:
    """The first segments of a chain, every byte of them checked, their tensors let go of but for names.

    Args:
        directory: The recording.
        description: Of the recording.
        root: sha256 of its file.
        rank: Whose chain.
        count: How many segments.

    Returns:
        The segments.

    Raises:
        ArtifactError: Naming the first one that is missing, altered, or of another run.
    """
    out: list[Segment] = []
    for index in range(count):
        name = f"{rank_name(rank)}/{segment_name('chord', index)}"
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory}: {name} is missing from the recording")
        found = read_segment(directory / name)
        check_link(name, found, description, rank, index, out[-1].sha256 if out else root)
        rows = {"rows": {"example_ids": found.groups["rows"]["example_ids"]}} if "rows" in found.groups else {}
        names = {"names": found.groups["names"]} if "names" in found.groups else {}
        out.append(Segment(found.header, found.sha256, {**rows, **names}))
    return out


def check_link(
    name: str, found: Segment, description: Mapping[str, Any], rank: int, index: int, previous: str
) -> None:  # fmt: skip
    """Refuse a segment that is not the next one of its chain.

    Args:
        name: What an error calls it.
        found: The segment.
        description: Of its recording.
        rank: Whose it must be.
        index: Its number.
        previous: sha256 of what it must follow.

    Raises:
        ArtifactError: If it is another.
    """
    header = found.header
    wanted = {"run_id": description["run_id"], "rank": rank, "index": index,
              "configuration": description["configuration_sha256"]}  # fmt: skip
    for key, value in wanted.items():
        if getattr(header, key) != value:
            raise ArtifactError(f"{name}: its {key} is {getattr(header, key)!r}, {value!r} expected: of another run")
    if header.previous != previous:
        raise ArtifactError(
            f"{name}: it follows a segment with the sha256 {header.previous[:16]}..., but the one before it has "
            f"{previous[:16]}...: one of them was altered or is of another run"
        )


def set_aside(own: Path, segments: int, opened: int) -> None:
    """Move what came after a checkpoint out of the way, the last first: what is left is a chain at every moment."""
    later = [p for p in own.glob("segment-*.safetensors") if _number(p) >= segments]
    later += [p for p in own.glob("open-*.safetensors") if _number(p) > opened]
    if not later:
        return
    attempts = own / "discarded"
    attempts.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=-1)
    target = attempts / f"{number:06d}"
    target.mkdir()
    fsync_directory(attempts)
    for path in sorted(later, key=lambda p: (_number(p), p.name), reverse=True):
        path.rename(target / path.name)
    fsync_directory(target)
    fsync_directory(own)


def _number(path: Path) -> int:
    digits = path.name.removesuffix(".safetensors").rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def segments_of(own: Path, kind: str) -> Sequence[int]:
    """Numbers of the segments of a kind in a process' folder, rising."""
    prefix = "open" if kind == "open" else "segment"
    return sorted(n for p in own.glob(f"{prefix}-*.safetensors") if (n := _number(p)) >= 0)
