"""Files that others may have damaged or made: what is refused, by which name, and what is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pathkernel import ArtifactError, KernelMachine, verify
from lightning_pathkernel.chord_io import chord_name, read_chord
from lightning_pathkernel.packed_io import read_packed
from lightning_pathkernel.store import publish, publish_json, publish_tensors, read_group, read_tensors
from tests.store.artifacts import (
    CONSTANTS,
    DEEP,
    MANIFEST,
    MIDDLE,
    WEIGHT,
    edit,
    flip,
    names,
    network,
    recorded,
    refused,
)

# publishing


def test_publishing_never_overwrites(tmp_path: Path) -> None:
    path = publish_json(tmp_path / "a.json", {"first": 1})
    with pytest.raises(FileExistsError, match=r"a\.json exists already and is not overwritten"):
        publish_json(path, {"second": 2})
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="dangling exists already"):
        publish_json(tmp_path / "dangling", {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert names(tmp_path) == ["a.json", "dangling"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "a", half)
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish_json(tmp_path / "b", {"x": float("nan")})
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "c", lambda path: None)
    assert names(tmp_path) == []


@pytest.mark.parametrize("site", ["fsync", "chmod", "link"])
def test_a_failing_system_call_leaves_nothing(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, site, fails)
    with pytest.raises(OSError, match="input/output error"):
        publish_tensors(tmp_path / "a", {"x": torch.zeros(3)}, {})
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_synced_takes_the_file_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in its place, but nobody says that it will be after a power cut."""
    sync = os.fsync
    seen: list[list[str]] = []

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            seen.append(names(tmp_path))
            raise OSError(errno.EIO, "input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="input/output error"):
        publish_tensors(tmp_path / "a", {"x": torch.zeros(3)}, {})
    assert seen == [["a"]]
    assert names(tmp_path) == []


def test_views_are_published_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given = {"t": base.T, "row": base[1], "wide": base[:, :1].expand(3, 5)}
    path = publish_tensors(tmp_path / "a", given, {"format": "pt"})
    assert path.stat().st_mode & 0o777 == 0o644, "safetensors alone lets nobody else read"
    found, metadata = read_tensors(path)
    assert metadata == {"format": "pt"}
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


# tensors


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], size: int = 0) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


BAD_FILES = {
    "empty": b"",
    "shorter than a header": b"abc",
    "random": random.Random(0).randbytes(4096),
    "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header not a dictionary": safetensors([]),
    "header not UTF-8": safetensors(b"\xff" * 8),
    "header nested too deep": safetensors(DEEP.encode()),
    "no data": safetensors({"a": tensor([1], 4)}),
    "data of another size": safetensors({"a": tensor([3], 4)}, b"abcd"),
    "data left over": safetensors({"a": tensor([1], 4)}, b"abcdefgh"),
    "unknown dtype": safetensors({"a": {**tensor([1], 4), "dtype": "F33"}}, b"abcd"),
    "overlap": safetensors({"a": tensor([1], 4), "b": tensor([1], 4)}, b"abcd"),
    "shape that overflows": safetensors({"a": tensor([2**63, 2**63])}),
    "shape that overflows, of no bytes": safetensors({"a": tensor([2**63, 0])}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_safetensors_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(BAD_FILES[name])
    with refused(r"^x\.safetensors: "):
        read_tensors(tmp_path / "x.safetensors")


def test_a_legal_header_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    """Half a million names in 33 MB cost seconds and gigabytes."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(b"{}" + b" " * (17 << 20)))
    with refused(r"^x\.safetensors: header of 17825794 bytes, at most 16777216 are accepted"):
        read_tensors(path)


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path: Path) -> None:
    with refused(r"^nope\.safetensors: .*No such file"):
        read_tensors(tmp_path / "nope.safetensors")
    with refused(f"^{tmp_path.name}: .*directory"):
        read_tensors(tmp_path)


READERS = {
    "recording": read_chord,
    "machine": lambda path: read_packed(path, None),
}


@pytest.mark.parametrize("part", READERS)
@pytest.mark.parametrize("whole_chord", [False, True])
def test_every_truncation_is_refused_by_name(whole_chord: bool, part: str, run: Path, tmp_path: Path) -> None:
    read = READERS[part] if whole_chord else read_tensors
    whole = (recorded(run / part, 1) if part == "recording" else run / part / MIDDLE).read_bytes()
    rng = random.Random(1)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))]:
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with refused(r"^cut\.safetensors: "):
            read(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("facts", [None, "", "{", "\ud800", DEEP], ids=["none", "empty", "torn", "surrogate", "deep"])
def test_unreadable_facts_are_refused_by_name(facts: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"__metadata__": {} if facts is None else {"facts": facts}}))
    with refused(r"^x\.safetensors: "):
        read_group(path)


# manifests


def test_a_sound_machine_is_accepted(machine: Path) -> None:
    digest = hashlib.sha256((machine / MANIFEST).read_bytes()).hexdigest()
    verify(machine)
    verify(str(machine), expected_sha256=digest)
    edit(machine, lambda manifest: manifest.update(version=[1, 99]))
    verify(machine)
    with refused(r"^manifest\.json: sha256 [0-9a-f]{64}, [0-9a-f]{64} expected"):
        verify(machine, expected_sha256=digest)
    assert len(KernelMachine.load(machine, network()).chords) == 4


def listing(name: str) -> Callable[[dict], object]:
    return lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}})


MANIFESTS: dict[str, tuple[bytes | Callable[[dict], object], str]] = {
    "empty": (b"", "malformed"),
    "torn": (b'{"files": ', "malformed"),
    "not UTF-8": (b"\xff\xfe{}", "malformed"),
    "a list": (b"[]", "malformed"),
    "nested too deep": (DEEP.encode(), "malformed"),
    "too large": (b" " * ((16 << 20) + 1), "larger than"),
    "no files": (lambda m: m.pop("files"), "malformed"),
    "no format": (lambda m: m.pop("format"), "malformed"),
    "no version": (lambda m: m.pop("version"), "malformed"),
    "empty version": (lambda m: m.update(version=[]), "malformed"),
    "version that is a number": (lambda m: m.update(version=0), "malformed"),
    "another format": (lambda m: m.update(format="other"), r"format 'other' \[1, 1\], this version reads"),
    "a newer major version": (lambda m: m.update(version=[2, 0]), r"\[2, 0\], this version reads .* 1\.x"),
    "an older major version": (lambda m: m.update(version=[0, 1]), r"\[0, 1\], this version reads .* 1\.x"),
    "an unknown required feature": (lambda m: m.update(required_features=["rotation"]), "rotation"),
    "files that are no dictionary": (lambda m: m.update(files=["README.md"]), "malformed"),
    "facts that are no dictionary": (lambda m: m["files"].update({"README.md": 3}), "malformed"),
    "no facts": (lambda m: m["files"].update({"README.md": {}}), "README.md"),
    "a file that is not there": (listing("more.safetensors"), "^more.safetensors: .*no such file"),
    "a name with a zero byte": (listing("a\0b"), "no such file|not a plain"),
    "a name that is too long": (listing("a" * 300), "no such file|not a plain"),
}
for bad in ("../x", "a/b", "..", ".", "", "/etc/passwd", "a\\b", "./README.md", "x/"):
    MANIFESTS[f"name {bad!r}"] = (listing(bad), re.escape(f"{bad!r} is not a plain file name"))


@pytest.mark.parametrize("name", MANIFESTS)
def test_hostile_manifests_are_refused(name: str, machine: Path) -> None:
    change, match = MANIFESTS[name]
    (machine / "x").mkdir()
    (machine.parent / "x").write_text("1")
    if isinstance(change, bytes):
        (machine / MANIFEST).write_bytes(change)
    else:
        edit(machine, change)
    with refused(match):
        verify(machine)
    with refused(match):
        KernelMachine.load(machine, network())


def sub(key: str, change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda m: change(m["module"]["parameters"][key])


CONTENTS: dict[str, Callable[[dict], object]] = {
    "no module": lambda m: m.pop("module"),
    "module of nothing": lambda m: m.update(module={}),
    "module that is a list": lambda m: m.update(module=[]),
    "parameter without facts": lambda m: m["module"]["parameters"].update({WEIGHT: None}),
    "parameter without shape": sub(WEIGHT, lambda facts: facts.pop("shape")),
    "parameter without flag": sub(WEIGHT, lambda facts: facts.pop("trainable")),
    "no chords": lambda m: m.pop("chords"),
    "list of no chords": lambda m: m.update(chords=[]),
    "chords that are no list": lambda m: m.update(chords=None),
    "chord names that are no names": lambda m: m.update(chords=[1]),
    "a chord that is not there": lambda m: m["chords"].append(chord_name(4)),
    "a chord that is not listed": lambda m: m["files"].pop(MIDDLE),
    "constants that are not listed": lambda m: m["files"].pop(CONSTANTS),
    "another file for a chord": lambda m: m.update(chords=[CONSTANTS]),
    "chords in another order": lambda m: m["chords"].reverse(),
    "a chord twice": lambda m: m["chords"].insert(1, chord_name(0)),
    "a chord left out": lambda m: m["chords"].remove(MIDDLE),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_manifests_whose_contents_make_no_machine_are_refused(name: str, machine: Path) -> None:
    edit(machine, CONTENTS[name])
    with refused():
        KernelMachine.load(machine, network())


@pytest.mark.parametrize("absolute", [False, True])
def test_no_chord_is_read_from_outside(absolute: bool, machine: Path) -> None:
    outside = shutil.copytree(machine, machine.parent / "outside")
    prefix = str(outside) if absolute else "../outside"
    edit(machine, lambda m: m.update(chords=[f"{prefix}/{name}" for name in m["chords"]]))
    with refused("^manifest.json: "):
        KernelMachine.load(machine, network())


def test_no_manifest(machine: Path) -> None:
    (machine / MANIFEST).unlink()
    for path in (machine, machine / "nowhere"):
        with refused("is not a kernel machine: it has no manifest.json"):
            verify(path)
        with refused("is not a kernel machine: it has no manifest.json"):
            KernelMachine.load(path, network())


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "outside"))


FILES = [chord_name(0), chord_name(3), CONSTANTS, "README.md", "metrics.json"]
SIZES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "listed in manifest.json, but there is no such file"),
    "symlink": (linked, "listed in manifest.json, but there is no such file"),
    "directory": (lambda path: path.unlink() or path.mkdir(), "listed in manifest.json, but there is no such file"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "expected: truncated or altered"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b" "), "expected: truncated or altered"),
}


@pytest.mark.parametrize("damage", SIZES)
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_as_listed_are_named(name: str, damage: str, machine: Path) -> None:
    """Seen without reading them, so by `load` too."""
    change, match = SIZES[damage]
    change(machine / name)
    with refused(f"^{re.escape(name)}: .*{re.escape(match)}$"):
        verify(machine)
    with refused(f"^{re.escape(name)}: .*{re.escape(match)}$"):
        KernelMachine.load(machine, network())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_named(name: str, machine: Path) -> None:
    flip(machine / name, (machine / name).stat().st_size // 2)
    with refused(f"^{re.escape(name)}: its sha256 is not the manifest's"):
        verify(machine)


@pytest.mark.parametrize("extra", ["chord-000009.safetensors", ".hidden", "directory"])
def test_what_is_not_listed_is_named(extra: str, machine: Path) -> None:
    (machine / extra).mkdir() if extra == "directory" else (machine / extra).write_text("")
    with refused(rf"^{re.escape(extra)}: not listed in manifest\.json"):
        verify(machine)


# bit flips


def survive_flips(machine: Path, count: int, seed: int) -> None:
    """Every flip is found by `verify`, and `load` refuses or loads; files are drawn first, so that small ones count.

    The manifest vouches for the other files; for the manifest itself only the author's sha256 does.
    """
    rng, files, module = random.Random(seed), names(machine), network()
    digest = hashlib.sha256((machine / MANIFEST).read_bytes()).hexdigest()
    unseen, escaped = [], []
    for _ in range(count):
        path = machine / rng.choice(files)
        where = (rng.randrange(path.stat().st_size), rng.randrange(8))
        whole = path.read_bytes()
        flip(path, *where)
        try:
            verify(machine, digest)
            unseen.append((path.name, where))
        except ArtifactError:
            pass
        try:
            KernelMachine.load(machine, module)
        except ArtifactError:
            pass
        except Exception as error:
            escaped.append((path.name, where, repr(error)))
        path.write_bytes(whole)
    assert not unseen
    assert not escaped
    verify(machine, digest)


def test_flipped_bits(machine: Path) -> None:
    survive_flips(machine, 40, seed=0)


@pytest.mark.slow
def test_many_flipped_bits(machine: Path) -> None:
    survive_flips(machine, 1500, seed=1)
