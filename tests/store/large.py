"""Artifacts of many examples, made of a small one."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import torch

from lightning_pathkernel.store import CHUNK, file_table, read_group, write_group
from lightning_pathkernel.store.checked_file import file_facts
from tests.store.artifacts import edit


def enlarged(machine: Path, out: Path, count: int) -> Path:
    """The same network with ``count`` examples in every chord: those that are there, over and over, ever smaller."""
    shutil.copytree(machine, out)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(out.glob("chord-*")):
        groups, facts = read_group(path)
        rows = groups["rows"]
        which = torch.randint(len(rows["rows"]), (count,), generator=generator)
        scale = torch.rand(count, 1, generator=generator) ** 4
        rows["rows"] = (rows["rows"][which] * scale).half()
        rows["self_inner"] = rows["self_inner"][which].contiguous()
        rows["example_ids"] = (2 * torch.arange(count) + facts["index"] % 2).to(torch.int32)
        path.unlink()
        write_group(path, groups, facts)
    edit(out, lambda manifest: manifest.update(files=file_table(out)))
    return out


def sparse(machine: Path, out: Path, size: int) -> Path:
    """The same network with examples of ``size`` bytes in all, every byte of them 0, on a file system that keeps holes.

    Their ids do not ascend, and no sha256 is right: it can be opened, and its network asked, but no example.
    """
    shutil.copytree(machine, out)
    chords = sorted(out.glob("chord-*"))
    for path in chords:
        groups, facts = read_group(path)
        rows = groups.pop("rows")
        width = rows["rows"].shape[1]
        count = size // len(chords) // (2 * width + 8)
        rows |= {"rows": torch.zeros(1, width, dtype=torch.half), "self_inner": torch.zeros(1)}
        rows["example_ids"] = torch.zeros(1, dtype=torch.int32)
        path.unlink()
        write_group(path, {**groups, "rows": rows}, facts)
        _grow(path, count)
    edit(out, lambda manifest: manifest.update(files=_facts(out)))
    return out


def _grow(path: Path, count: int) -> None:
    """Give the tensors of one example ``count`` of them, at the end of the file, as a hole."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    grown = ("rows/rows", "rows/self_inner", "rows/example_ids")
    kept, at = b"", 0
    for name, entry in header.items():
        if name not in ("__metadata__", *grown):
            begin, end = entry["data_offsets"]
            kept += data[8 + length + begin : 8 + length + end]
            entry["data_offsets"] = [at, at := at + end - begin]
    for name in grown:
        begin, end = header[name]["data_offsets"]
        header[name]["shape"][0] = count
        header[name]["data_offsets"] = [at, at := at + (end - begin) * count]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + kept)
    os.truncate(path, 8 + len(text) + at)


def _facts(directory: Path) -> dict[str, dict[str, str | int]]:
    """As `file_table`, knowing where nothing but zeros is to be read."""
    facts = {}
    for path in sorted(directory.iterdir()):
        if path.name == "manifest.json":
            continue
        size, small = path.stat().st_size, path.with_suffix(".head")
        with open(path, "rb") as file:
            small.write_bytes(file.read(4 * CHUNK))
        head, zero = file_facts(small), "14298c12"  # CRC32C of a chunk of zeros
        chunks, rest = divmod(size, CHUNK)
        sums = str(head["crc32c"])[: 8 * 4] + zero * max(0, chunks - 4) + ("0" * 8 if rest and chunks >= 4 else "")
        small.unlink()
        facts[path.name] = {"bytes": size, "sha256": "0" * 64, "crc32c": sums}
    return facts
