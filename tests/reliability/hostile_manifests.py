"""Manifests that nobody who exported a machine has written, and directories that are none: kind -> what makes one."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_pathkernel.store import file_table
from tests.store.artifacts import CONSTANTS, DEEP, MANIFEST, MIDDLE, WEIGHT, edit

__all__ = ["DIRECTORIES", "EDITS", "NAMES", "TEXTS", "Change", "keys"]

Change = Callable[[Path], object]
MANY = 200_000


def raw(data: bytes) -> Change:
    """The manifest is this."""
    return lambda machine: (machine / MANIFEST).write_bytes(data)


def spliced(old: str, new: str) -> Change:
    """The manifest's text with one place changed."""

    def change(machine: Path) -> None:
        text = (machine / MANIFEST).read_text()
        assert old in text, old
        (machine / MANIFEST).write_text(text.replace(old, new, 1))

    return change


TEXTS: dict[str, Change] = {
    "empty": raw(b""),
    "torn": lambda m: os.truncate(m / MANIFEST, (m / MANIFEST).stat().st_size // 2),
    "not UTF-8": raw(b"\xff\xfe{}"),
    "UTF-16": lambda m: (m / MANIFEST).write_bytes((m / MANIFEST).read_text().encode("utf-16")),
    "a byte order mark": lambda m: (m / MANIFEST).write_bytes(b"\xef\xbb\xbf" + (m / MANIFEST).read_bytes()),
    "a list": raw(b"[]"),
    "a number": raw(b"1"),
    "a string": raw(b'"manifest"'),
    "null": raw(b"null"),
    "an empty object": raw(b"{}"),
    "arrays nested 100,000 deep": raw(DEEP.encode()),
    "objects nested 100,000 deep": raw(b'{"a":' * 100_000),
    "nested deep in a value": spliced('"required_features": []', f'"required_features": {DEEP}{"]" * 100_000}'),
    "17 MB of spaces": raw(b" " * (17 << 20)),
    "15 MB of empty arrays": raw(b"[" + b"[]," * (5 << 20) + b"[]]"),
    "15 MB of escapes": raw(b'"' + b"\\u0000" * (5 << 19) + b'"'),
    "trailing text": lambda m: (m / MANIFEST).write_bytes((m / MANIFEST).read_bytes() + b"{}"),
    "a comment": lambda m: (m / MANIFEST).write_bytes(b"// mine\n" + (m / MANIFEST).read_bytes()),
    "NaN": spliced('"required_features": []', '"required_features": NaN'),
    "Infinity": spliced('"version": [', '"version": [Infinity, '),
    "-Infinity": spliced('"version": [', '"version": [-Infinity, '),
    "1e999": spliced('"version": [', '"version": [1e999, '),
    "a number of a million digits": spliced('"version": [', '"version": [' + "9" * 1_000_000 + ", "),
    "a key twice": spliced('"format":', '"format": "other", "format":'),
    "a file twice": spliced('"files": {', '"files": {"README.md": {}, '),
    "a pickle": raw(b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."),
}


def listing(name: str) -> Change:
    """One more file is listed, which is there, with its checksums, wherever a file of this name can be."""

    def change(machine: Path) -> None:
        (machine.parent / "sums").mkdir()
        (machine.parent / "sums" / "x").write_bytes(b"1")
        try:
            (machine / name).parent.mkdir(exist_ok=True)
            if not (machine / name).exists():
                (machine / name).write_bytes(b"1")
        except (OSError, ValueError):
            pass
        edit(machine, lambda m: m["files"].update({name: file_table(machine.parent / "sums")["x"]}))

    return change


NAMES: dict[str, Change] = {
    f"file named {name[:40]!r}": listing(name)
    for name in (
        "..", ".", "", "../x", "../../etc/passwd", "a/b", "/etc/passwd", "//etc/passwd", "./README.md", "x/", "a\\b",
        "..\\x", "\\\\host\\share", "C:", "C:x", "C:\\x", "c:/x", "a\0b", "a\nb", "a\rb", "a\x1b[2Jb", "\ud800",
        "a" * 300, "~root", "$HOME", "%2e%2e/x", "file:///etc/passwd", "memory://x", "https://example.org/x", ".hidden",
        "-rf", "README.md ", "\u2024\u2024/x", "\uff0e\uff0e\uff0fx", "read\u200bme", "manifest.json",
    )
}  # fmt: skip


def fact(name: str, key: str, value: Any) -> Change:
    """One entry of the table of files says something else."""
    return lambda machine: edit(machine, lambda m: m["files"][name].update({key: value}))


def grown(machine: Path) -> None:
    """A chord of a terabyte, as listed, of which nothing is on the disk."""
    os.truncate(machine / MIDDLE, 1 << 40)
    sums = {"bytes": 1 << 40, "sha256": "0" * 64, "crc32c": "0" * 8}
    edit(machine, lambda m: m["files"].update({MIDDLE: sums}))


def million(machine: Path) -> None:
    """A million files that are not there."""
    manifest = json.loads((machine / MANIFEST).read_text())
    manifest["files"] |= {f"f{number}": 0 for number in range(1_000_000)}
    (machine / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")))


EDITS: dict[str, Change] = {
    **{
        f"{key} of {value!r:.24}": fact(MIDDLE, key, value)
        for key, values in {
            "bytes": (-1, 0, 2**63, 2**64, 10**400, 1.5, True, "12", None, [], {}),
            "sha256": ("", "0" * 63, "0" * 65, "g" * 64, "A" * 64, 0, None, [], "0" * 10_000_000),
            "crc32c": ("", "0", "0" * 7, "0" * 16, "x" * 8, 0, None, [], "0" * 8_000_000),
        }.items()
        for value in values
    },
    **{
        f"version {value!r:.24}": (lambda machine, value=value: edit(machine, lambda m: m.update(version=value)))
        for value in (
            [2, 0],
            [0, 1],
            [1, -1],
            [1],
            [],
            [1, 0, 0],
            [1.0, 0],
            [1, True],
            ["1", "0"],
            "1.0",
            1,
            None,
            {},
            [10**400, 0],
            [[1], 0],
        )
    },
    **{
        f"required feature {value!r:.24}": (
            lambda machine, value=value: edit(machine, lambda m: m.update(required_features=value))
        )
        for value in (["rotation"], "x", [1], [[]], None, {"x": 1}, ["x" * 1_000_000], ["\ud800"])
    },
    **{
        f"shape {value!r:.24}": (
            lambda machine, value=value: edit(machine, lambda m: m["module"]["parameters"][WEIGHT].update(shape=value))
        )
        for value in ([-1, 64], [2**62, 2**62], [1.5], [True, 64], "12x64", None, {}, [10**400], [12] * 100_000)
    },
    **{
        f"dtype {value!r:.24}": (
            lambda machine, value=value: edit(machine, lambda m: m["module"]["parameters"][WEIGHT].update(dtype=value))
        )
        for value in ("object", "os.system", "float99", 1, None, [], "x" * 1_000_000)
    },
    "another format": lambda machine: edit(machine, lambda m: m.update(format="other")),
    "a format that is no text": lambda machine: edit(machine, lambda m: m.update(format=["lightning_pathkernel"])),
    "a million files": million,
    "200,000 parameters": lambda machine: edit(
        machine, lambda m: m["module"].update(parameters={str(i): 0 for i in range(MANY)})
    ),
    "200,000 chords": lambda machine: edit(
        machine, lambda m: m.update(chords=[f"chord-{i:06d}.safetensors" for i in range(MANY)])
    ),
    "chords in another order": lambda machine: edit(machine, lambda m: m["chords"].reverse()),
    "a chord twice": lambda machine: edit(machine, lambda m: m["chords"].insert(1, m["chords"][0])),
    "chords of another directory": lambda machine: edit(
        machine, lambda m: m.update(chords=[f"../machine/{name}" for name in m["chords"]])
    ),
    "chords that are lists": lambda machine: edit(machine, lambda m: m.update(chords=[[name] for name in m["chords"]])),
    "the constants as a chord": lambda machine: edit(machine, lambda m: m.update(chords=[CONSTANTS])),
    "no trainable parameter": lambda machine: edit(
        machine, lambda m: [f.update(trainable=False) for f in m["module"]["parameters"].values()]
    ),
    "a terabyte that is not there": grown,
}


def replaced(name: str, make: Callable[[Path], object]) -> Change:
    """A file of the artifact is something else."""

    def change(machine: Path) -> None:
        (machine / name).rename(machine.parent / "moved")
        make(machine / name)

    return change


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a link": lambda path: path.symlink_to(path.parent.parent / "moved"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a directory": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a socket": listening,
}


def linked_directory(machine: Path) -> None:
    """The chord within a directory that is a link."""
    outside = machine.parent / "outside"
    shutil.copytree(machine, outside)
    (machine / "sub").symlink_to(outside)
    edit(machine, lambda m: m["files"].update({f"sub/{MIDDLE}": m["files"].pop(MIDDLE)}))


DIRECTORIES: dict[str, Change] = {
    **{f"the manifest is {kind}": replaced(MANIFEST, make) for kind, make in KINDS.items()},
    **{f"a chord is {kind}": replaced(MIDDLE, make) for kind, make in KINDS.items()},
    **{f"the constants are {kind}": replaced(CONSTANTS, make) for kind, make in KINDS.items()},
    "a directory that is a link": linked_directory,
    "the artifact is a file": lambda machine: (machine.rename(machine.parent / "gone"), machine.write_text("x")),
    "the artifact is a FIFO": lambda machine: (machine.rename(machine.parent / "gone"), os.mkfifo(machine)),
    "the artifact is missing": lambda machine: machine.rename(machine.parent / "gone"),
}


def keys(manifest: Any, path: tuple[Any, ...] = (), depth: int = 3) -> list[tuple[Any, ...]]:
    """Paths to the values of a manifest, down to a depth; of lists, to the first element."""
    found = []
    children: list[tuple[Any, Any]] = []
    if isinstance(manifest, dict):
        children = list(manifest.items())
    elif isinstance(manifest, list) and manifest:
        children = [(0, manifest[0])]
    for key, value in children:
        found.append((*path, key))
        if depth > 1:
            found += keys(value, (*path, key), depth - 1)
    return found
