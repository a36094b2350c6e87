"""Segments, trees and locks: every byte is checked, every number comes back as it was, and there is one writer."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_pathkernel.store import (
    ArtifactError,
    Head,
    HeldError,
    SegmentHeader,
    SegmentWriter,
    Stamp,
    StoreError,
    WriterLock,
    pack_tree,
    publish,
    read_segment,
    remove_temporaries,
    segment_name,
    unpack_tree,
    write_segment,
)
from tests.store.artifacts import names, recorded, refused


def header(index: int = 0, kind: str = "chord", **facts: Any) -> SegmentHeader:
    return SegmentHeader("a" * 32, 0, kind, index, 3, 7, "c" * 64, "p" * 64, facts)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "rank-0000"
    path.mkdir()
    return path


ODD = {
    "doubles": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
    "halves": torch.arange(6.0).half().reshape(2, 3).T,
    "brain": torch.arange(5.0).bfloat16(),
    "ids": torch.tensor([-(2**63), 2**63 - 1]),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(1.5),
    "none": torch.zeros(0, 4),
}


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_a_segment_comes_back_bit_for_bit_and_is_plain_safetensors(own: Path) -> None:
    said = header(5, note='"crc32c":"00000000" ü')
    digest = write_segment(own, said, {"a": ODD, "b/c": {"x": ODD["scalar"]}})
    path = own / segment_name("chord", 5)
    assert names(own) == ["segment-000005.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644
    found = read_segment(path)
    assert (found.header, found.sha256) == (said, digest)
    with safe_open(str(path), framework="pt") as other:
        assert other.metadata()["kind"] == "chord"
        for name, tensor in ODD.items():
            for value in (found.groups["a"][name], other.get_tensor(f"a/{name}")):
                assert value.dtype == tensor.dtype
                assert value.shape == tensor.shape
                assert raw(value).equal(raw(tensor))


def test_what_is_written_depends_on_nothing_but_what_is_said(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(write_segment(tmp_path / name, header(1, a=1, b=[2]), {"a": dict(ODD)}))
        time.sleep(0.01)
    assert made[0] == made[1]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_segment(own, header(), {})
    before = (own / segment_name("chord", 0)).read_bytes()
    with pytest.raises(FileExistsError):
        write_segment(own, header(kind="end"), {"a": ODD})

    def fails(*args: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="input/output"):
        write_segment(own, header(1), {"a": ODD})
    assert names(own) == [segment_name("chord", 0)]
    assert (own / segment_name("chord", 0)).read_bytes() == before


def test_a_flipped_bit_in_any_byte_of_a_small_segment_is_found(own: Path) -> None:
    write_segment(own, header(2), {"a": {"x": torch.arange(4.0)}})
    path = own / segment_name("chord", 2)
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with refused(r"^rank-0000/segment-000002\.safetensors: "):
            read_segment(path)
    path.write_bytes(whole)
    read_segment(path)


def test_truncations_and_additions_are_found(own: Path) -> None:
    write_segment(own, header(2), {"a": {"x": torch.arange(4.0)}})
    path = own / segment_name("chord", 2)
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with refused(r"^rank-0000/segment-000002\.safetensors: "):
            read_segment(path)
    path.write_bytes(whole + b"\0")
    with refused("CRC32C"):
        read_segment(path)


def test_random_flips_in_a_real_recording_are_found(run: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    source = recorded(run / "recording", 1)
    whole = source.read_bytes()
    path = tmp_path / source.name
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            read_segment(path)


def test_a_header_that_lies_is_refused_though_its_checksum_is_right(own: Path) -> None:
    write_segment(own, header(0), {"a": {"x": torch.arange(4.0)}})
    path = own / segment_name("chord", 0)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for old, new in (
        (b'"format":"lightning_pathkernel.recording"', b'"format":"lightning_pathkernel.recordinh"'),
        (b'"version":"1.0"', b'"version":"2.0"'),
        (b'"shape":[4]', b'"shape":[9]'),
        (b'"rank":"0"', b'"rank":"x"'),
        (b'"previous"', b'"previouz"'),
        (b'"facts":"{', b'"facts":"['),
    ):
        assert old in data
        changed = data[:8] + data[8 : 8 + length].replace(old, new) + data[8 + length :]
        at = changed.index(b'"crc32c":"') + 10
        crc = google_crc32c.value(changed[:at] + b"0" * 8 + changed[at + 8 :])
        path.write_bytes(changed[:at] + f"{crc:08x}".encode() + changed[at + 8 :])
        with refused(r"^rank-0000/segment-000000\.safetensors: "):
            read_segment(path)


# trees


def test_a_tree_comes_back_with_its_strides_and_what_it_shares(own: Path) -> None:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tree = {
        "shared": [base, {"again": base}], "turned": base.T, "part": base[:, 2:5], "row": base[1],
        "plain": [None, True, 3, 0.1 + 0.2, math.inf, -math.inf, "ü", (1, [2.5])], "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2), "t": {"d": {"f": "no tensor"}},
    }  # fmt: skip
    write_segment(own, header(kind="open"), {"state": pack_tree(tree)})
    found = unpack_tree(read_segment(own / "open-000000.safetensors").groups["state"])
    assert found["shared"][0] is found["shared"][1]["again"]
    for name in ("turned", "part", "row", "none", "scalar"):
        tensor = tree[name]
        assert isinstance(tensor, Tensor)
        assert torch.equal(found[name], tensor)
        assert found[name].stride() == tensor.stride() or not tensor.numel()
    assert found["part"].storage_offset() % 16 == base[:, 2:5].storage_offset() % 16
    assert found["plain"] == [None, True, 3, 0.1 + 0.2, math.inf, -math.inf, "ü", [1, [2.5]]]
    assert found["t"] == tree["t"]


def test_a_tree_has_no_objects(own: Path) -> None:
    for wrong in ({1: 2}, [object()], {"a": {3}}, [b"x"]):
        with pytest.raises(TypeError):
            pack_tree(wrong)


@pytest.mark.parametrize(
    "body", [b"", b"[", b'{"tree": {"t": 0}, "layouts": []}', b'{"tree": {"x": 0}, "layouts": []}', b"[" * 99999]
)
def test_a_malformed_tree_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        unpack_tree({"tree": torch.frombuffer(bytearray(body) or bytearray(1), dtype=torch.uint8)[: len(body)]})


def test_strides_that_would_take_memory_are_not_believed() -> None:
    body = json.dumps({"tree": {"t": 0}, "layouts": [[[1 << 40], 0, False]]}).encode()
    found = unpack_tree({"0": torch.arange(3.0), "tree": torch.frombuffer(bytearray(body), dtype=torch.uint8)})
    assert found.tolist() == [0, 1, 2]


# writers


def test_an_error_of_the_thread_surfaces_at_the_next_call_and_nothing_follows_it(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SegmentWriter(own, Stamp("r", 0, "c"), Head(0, "root"))
    made.put("chord", (0, 1), {}, {"a": ODD})
    made.flush()

    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    made.put("chord", (1, 2), {}, {"a": ODD})
    with pytest.raises(StoreError, match=r"No space left on device.* 1 segments are safe in"):
        made.flush()
    monkeypatch.undo()
    for call in (made.check, made.flush, lambda: made.put("chord", (2, 3), {}, {})):
        with pytest.raises(StoreError, match="No space left"):
            call()
    assert names(own) == [segment_name("chord", 0)]


def test_open_segments_stand_beside_the_chain(own: Path) -> None:
    made = SegmentWriter(own, Stamp("r", 0, "c"), Head(0, "root"))
    made.put("chord", (0, 1), {}, {})
    made.put("open", (1, 2), {}, {"state": pack_tree([1])}, 0)
    made.put("chord", (1, 3), {}, {})
    head, (name, digest) = made.flush()
    first, opened, second = (
        read_segment(own / n) for n in ("segment-000000.safetensors", name, "segment-000001.safetensors")
    )
    assert opened.header.previous == second.header.previous == first.sha256
    assert (opened.sha256, head.sha256, head.segments) == (digest, second.sha256, 2)


def test_an_interpreter_that_exits_waits_for_what_was_handed_over(own: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from lightning_pathkernel.store import Head, SegmentWriter, Stamp\n"
        "w = SegmentWriter(Path(sys.argv[1]), Stamp('r', 0, 'c'), Head(0, 'root'))\n"
        "[w.put('chord', (i, i + 1), {}, {'a': {'x': torch.zeros(1 << 18)}}) for i in range(5)]\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(own)], check=True, timeout=100)
    assert time.perf_counter() - start < 100
    assert names(own) == [segment_name("chord", i) for i in range(5)]
    assert all(read_segment(own / name) for name in names(own))


def test_one_writer_in_a_process_and_among_processes(own: Path) -> None:
    lock = WriterLock(own)
    for _ in range(2):
        with pytest.raises(HeldError, match="lock is held by another writer"):
            WriterLock(own)
    code = (
        "import sys; from pathlib import Path; from lightning_pathkernel.store import WriterLock, HeldError\n"
        "import time; start = time.perf_counter()\n"
        "try: WriterLock(Path(sys.argv[1]))\n"
        "except HeldError: sys.exit(7 if time.perf_counter() - start < 1 else 8)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(own)], check=False, timeout=100).returncode == 7
    lock.release()
    assert subprocess.run([sys.executable, "-c", code, str(own)], check=False, timeout=100).returncode == 0
    WriterLock(own).release()


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "kept.json", lambda path: path.write_text("x") and None)
    for name in (".segment-000001.safetensors.0123abcd.tmp", ".hidden", "mine.tmp"):
        (tmp_path / name).write_text("x")
    assert remove_temporaries(tmp_path) == [".segment-000001.safetensors.0123abcd.tmp"]
    assert names(tmp_path) == [".hidden", "kept.json", "mine.tmp"]
