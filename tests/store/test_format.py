"""docs/format.md: a reader written from it finds the same numbers, and a stranger's file is held to its limits."""

from __future__ import annotations

import ast
import json
import os
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.chord import Chord, direction_of
from lightning_pathkernel.packed_io import read_packed
from lightning_pathkernel.store import (
    CHUNK,
    CheckedFile,
    TensorFile,
    file_table,
    publish_tensors,
    read_group,
    write_group,
)
from lightning_pathkernel.store.checked_file import file_facts
from lightning_pathkernel.store.strict_json import parse_json
from tests.golden.make import Tiny
from tests.store import plain_reader
from tests.store.artifacts import MANIFEST, edit, flip, network, refused

GOLDEN = Path(__file__).parents[1] / "golden"
DOCS = Path(__file__).parents[2] / "docs" / "format.md"


def test_the_plain_reader_is_a_stranger() -> None:
    tree = ast.parse(Path(plain_reader.__file__).read_text())
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found == {"__future__", "hashlib", "json", "pathlib", "struct", "numpy"}
    assert plain_reader.crc32c(b"123456789") == 0xE3069283


def direction(chord: Chord) -> dict[str, Tensor]:
    """``examples_direction`` of a chord summed in double precision, as the plain reader sums."""
    sketches = {
        name: sketch.with_tensors({key: value.double() for key, value in sketch.tensors().items()})
        for name, sketch in chord.sketches.items()
    }
    second = None if chord.second_stage is None else chord.second_stage.double()
    return direction_of(chord.rows.double().sum(0), sketches, second, chord.preconditioner, chord.start)


def held_against(directory: Path, module: torch.nn.Module) -> int:
    """Every number of every chord, as the package decodes it; the number of arrays compared."""
    machine, count = KernelMachine.load(directory, module), 0
    parts = ("start", "delta", "start_buffers", "end_buffers", "preconditioner", "decay", "residual")
    for found, chord in zip(plain_reader.machine(directory), machine.chords, strict=True):
        whole = chord.weights(1.0)
        pairs = {f"{p}/{n}": (found[p][n], v) for p in parts for n, v in getattr(chord, p).items()}
        pairs |= {f"end/{n}": (found["end"][n], whole[n]) for n in whole}
        for part in parts:
            assert found[part].keys() == getattr(chord, part).keys(), part
        for part in ("example_ids", "rows", "self_inner", "second_stage"):
            expected = getattr(chord, part)
            assert (found[part] is None) == (expected is None)
            pairs |= {part: (found[part], expected)} if expected is not None else {}
        for name, sketch in chord.sketches.items():
            for kind in ("query_left", "query_right"):
                factor = getattr(sketch, kind)
                assert (name in found[kind]) == (factor is not None)
                pairs |= {f"{kind}/{name}": (found[kind][name], factor)} if factor is not None else {}
        for name, (mine, theirs) in pairs.items():
            exact = not name.startswith("preconditioner")  # a power of 2 that is no integer's may be off by one bit
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=0 if exact else 1e-6, atol=0, err_msg=name)
            assert mine.dtype == theirs.numpy().dtype, name
        assert [[n, s.rows, s.columns] for n, s in chord.sketches.items()] == found["facts"]["sketches"]
        assert {int(key): name for key, name in found["names"].items()} == chord.names
        for name, value in direction(chord).items():
            size = float(value.abs().max())
            np.testing.assert_allclose(plain_reader.direction(found)[name], value.numpy(), rtol=1e-6, atol=1e-6 * size)
        count += len(pairs)
    return count


@pytest.mark.parametrize("name", ["1.0/rows-16", "1.0/rows-8", "1.1/rows-16", "1.1/rows-8"])
def test_a_reader_written_from_the_page_finds_the_same_numbers(name: str) -> None:
    assert held_against(GOLDEN / name, Tiny()) > 90


@pytest.mark.parametrize("bits", [8, 16])
def test_it_reads_a_larger_machine_too(bits: int, run: Path, tmp_path: Path) -> None:
    out = KernelMachineExporter(run / "recording").export(tmp_path / "machine", row_bits=bits)
    assert held_against(out, network()) > 150


def test_the_page_names_every_tensor_and_every_key(machine: Path) -> None:
    page, groups, keys = DOCS.read_text(), set(), set()
    for path in [*machine.glob("chord-*"), *GOLDEN.glob("*/rows-*/chord-*")]:
        for name in plain_reader.tensors(path)[0]:
            group, _, own = name.partition("/")
            groups.add(name if group in ("rows", "names") else f"{group}/")
            assert own
        keys |= json.loads(plain_reader.tensors(path)[1]["facts"]).keys()
    keys |= json.loads((machine / MANIFEST).read_text()).keys()
    assert len(groups) > 15
    assert not [name for name in groups if f"`{name}" not in page]
    assert not [key for key in keys if f"`{key}`" not in page]


def test_checksums_cost_next_to_nothing(machine: Path) -> None:
    """Eight digits for each MiB: 8 bytes of a million."""
    table = file_table(machine)
    assert {len(str(facts["crc32c"])) for facts in table.values()} == {8}
    sums = sum(len(f', "crc32c": "{facts["crc32c"]}"') for facts in table.values())
    assert sums < 0.01 * sum(p.stat().st_size for p in machine.iterdir())


# chunks


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(3 * CHUNK + 5))
    facts = file_facts(tmp_path / "a.bin")
    for where, chunk, last in ((0, 0, CHUNK), (2 * CHUNK, 2, 3 * CHUNK), (3 * CHUNK + 4, 3, 3 * CHUNK + 5)):
        flip(tmp_path / "a.bin", where)
        file = CheckedFile(tmp_path / "a.bin", facts)
        with refused(rf"^a\.bin: .*is {chunk}, bytes {chunk * CHUNK} to {last - 1}: damaged or altered$"):
            file.verify()
        with refused(rf"bytes {chunk * CHUNK} to {last - 1}: damaged"):
            file.read(where, where + 1)
        other = (chunk + 1) % 3
        assert bytes(file.read(other * CHUNK, other * CHUNK + 9)) == bytes(9)
        file.close()
        flip(tmp_path / "a.bin", where)
    CheckedFile(tmp_path / "a.bin", facts).verify()


def test_what_crc32c_does_not_see_sha256_does(tmp_path: Path) -> None:
    """A table of checksums that was made for other bytes than the sha256."""
    (tmp_path / "a").write_bytes(b"one")
    facts = {**file_facts(tmp_path / "a"), "sha256": "0" * 64}
    with refused("^a: its sha256 is not the manifest's: damaged or altered$"):
        CheckedFile(tmp_path / "a", facts).verify()


FACTS: dict[str, object] = {
    "no checksums": None, "too few": "", "too many": "0" * 16, "upper case": "ABCDEF01", "no digits": "zzzzzzzz",
    "a list": ["00000000"], "a number": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_checksums_in_another_form_are_refused(name: str, machine: Path) -> None:
    edit(machine, lambda manifest: manifest["files"]["README.md"].update(crc32c=FACTS[name]))
    with refused(r"^manifest\.json: malformed: crc32c of README\.md"):
        KernelMachine.load(machine, network())


@pytest.mark.parametrize("value", [None, "", "0" * 63, "0" * 65, "G" * 64, 5, "A" * 64])
def test_a_sha256_in_another_form_is_refused(value: object, machine: Path) -> None:
    edit(machine, lambda manifest: manifest["files"]["README.md"].update(sha256=value))
    with refused(r"^manifest\.json: malformed: sha256 of README\.md"):
        verify(machine)


@pytest.mark.parametrize("given", ["", "abc", "0" * 63, "g" * 64])
def test_what_is_no_sha256_is_not_expected(given: str, machine: Path) -> None:
    with pytest.raises(ValueError, match="expected_sha256 must be 64 hexadecimal digits"):
        verify(machine, given)
    with pytest.raises(ValueError, match="expected_sha256 must be 64 hexadecimal digits"):
        KernelMachine.load(machine, network(), expected_sha256=given)


def test_loading_with_a_sha256_reads_every_byte(machine: Path) -> None:
    digest = plain_reader.hashlib.sha256((machine / MANIFEST).read_bytes()).hexdigest()
    KernelMachine.load(machine, network(), expected_sha256=digest.upper())
    flip(machine / "README.md", 3)
    KernelMachine.load(machine, network())
    with refused(r"^README\.md: its sha256 is not the manifest's"):
        KernelMachine.load(machine, network(), expected_sha256=digest)
    with refused(r"^manifest\.json: sha256 [0-9a-f]{64}, 0{64} expected"):
        KernelMachine.load(machine, network(), expected_sha256="0" * 64)


# versions


def test_another_version_is_refused_with_what_to_do(machine: Path) -> None:
    edit(machine, lambda m: m.update(version=[2, 0], libraries={"lightning_pathkernel": "3.1.4"}))
    with refused(
        r"\[2, 0\], this version reads .* 1\.x: install lightning_pathkernel 3\.1\.4, which wrote it, or a newer"
    ):
        verify(machine)
    edit(machine, lambda m: m.update(libraries={"lightning_pathkernel": "$(rm -rf /)\n"}))
    with refused("1.x: install the version of lightning_pathkernel that wrote it, or a newer one$"):
        verify(machine)
    edit(machine, lambda m: m.update(version=[1, 1], required_features=["rows-4", "a"]))
    with refused("required_features 'a', 'rows-4', which this version does not have: install"):
        verify(machine)


def test_a_newer_minor_version_and_what_it_adds_are_ignored(machine: Path) -> None:
    (machine / "figures.json").write_text("{}")
    edit(machine, lambda m: m.update(version=[1, 7], colour="blue", files=file_table(machine)))
    edit(machine, lambda m: m["files"]["figures.json"].update(more=[1, 2]))
    verify(machine)
    assert len(KernelMachine.load(machine, network()).chords) == 4


# limits


TEXTS: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no JSON number"),
    "beyond double precision": (b'{"a": 1e999}', "beyond double precision"),
    "too deep": (b"[" * 33 + b"]" * 33, "nested more than 32 deep"),
    "much too deep": (b"[" * 400_000, "nested more than 32 deep"),
    "deep behind escapes": (b'["\\n", "\\"", "\\\\", ' + b"[" * 40 + b"]" * 41, "nested more than 32 deep"),
    "too many values": (b"[" + b"0," * 600_000 + b"0]", "marks, at most 524288"),
    "too many empty lists": (b"[" + b"[]," * 600_000 + b"0]", "marks, at most 524288"),
    "too long": (b'"' + b"a" * (16 << 20) + b'"', "bytes of JSON, at most 16777216"),
    "no UTF-8": (b'"\xff"', "codec can't decode"),
    "a huge integer": (b"1" * 5000, "digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_json_beyond_its_limits_is_refused_at_little_cost(name: str) -> None:
    text, match = TEXTS[name]
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=match):
        parse_json(text)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1
    assert peak < 64e6, peak


def test_json_within_its_limits_is_read() -> None:
    deep = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    assert parse_json(deep)["a"] is not None
    brackets = json.dumps({"a": "[" * 1000 + '"\\', "b": ["{" * 50, 1.5, None, True, -3]}).encode()
    assert parse_json(brackets) == json.loads(brackets)


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[dict, int]] = {
    "a billion by nothing": ({"a": entry("F32", [10**9, 0], 0, 0)}, 0),
    "a product of 2^66": ({"a": entry("F32", [2**33, 2**33], 0, 4)}, 4),
    "a product that is 4 in 64 bits": ({"a": entry("I8", [2**62, 2**62, 4], 0, 4)}, 4),
    "a dimension of 2^62": ({"a": entry("I8", [2**62], 0, 4)}, 4),
    "negative dimensions": ({"a": entry("I8", [-2, -2], 0, 4)}, 4),
    "a dimension that is true": ({"a": entry("I8", [True, 4], 0, 4)}, 4),
    "a dimension that is a fraction": ({"a": entry("I8", [4.0], 0, 4)}, 4),
    "twenty dimensions": ({"a": entry("I8", [1] * 19 + [4], 0, 4)}, 4),
    "offsets the wrong way round": ({"a": entry("I8", [4], 4, 0)}, 4),
    "three offsets": ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4, 4]}}, 4),
    "a gap": ({"a": entry("I8", [1], 0, 1), "b": entry("I8", [2], 2, 4)}, 4),
    "data before the first": ({"a": entry("I8", [3], 1, 4)}, 4),
    "data of another tensor": ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [2], 2, 4)}, 4),
    "beyond the end": ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 4, 8)}, 4),
    "a dtype that is a list": ({"a": {"dtype": ["I8"], "shape": [4], "data_offsets": [0, 4]}}, 4),
    "a dtype of four bits": ({"a": entry("F4", [8], 0, 4)}, 4),
    "more keys": ({"a": {**entry("I8", [4], 0, 4), "device": "cuda"}}, 4),
    "metadata that are numbers": ({"__metadata__": {"facts": 3}, "a": entry("I8", [4], 0, 4)}, 4),
    "a name of a megabyte": ({"a" * 10**6: entry("I8", [4], 0, 4)}, 4),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_promise_what_is_not_there_are_refused(name: str, tmp_path: Path) -> None:
    header, size = HEADERS[name]
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with refused(r"^x\.safetensors: cannot be read as safetensors: "):
        TensorFile(CheckedFile(tmp_path / "x.safetensors"))


def test_truth_values_are_0_or_1(tmp_path: Path) -> None:
    path = publish_tensors(tmp_path / "x.safetensors", {"a": torch.tensor([True, False])}, {})
    assert TensorFile(CheckedFile(path)).get("a").tolist() == [True, False]
    flip(path, path.stat().st_size - 1)
    with refused("a truth value that is neither 0 nor 1"):
        TensorFile(CheckedFile(path)).get("a")


MADE: dict[str, Callable[[Path, socket.socket], object]] = {
    "fifo": lambda path, _: os.mkfifo(path),
    "socket": lambda path, bound: bound.bind(str(path)),
    "link": lambda path, _: path.symlink_to(path.parent.parent / path.name),
    "link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "directory": lambda path, _: path.mkdir(),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_no_regular_file_is_neither_waited_for_nor_followed(kind: str, machine: Path) -> None:
    for name in ("chord-000001.safetensors", MANIFEST):
        path, kept = machine / name, machine.parent / name
        path.rename(kept)
        with socket.socket(socket.AF_UNIX) as bound:
            MADE[kind](path, bound)
            for ask in (verify, lambda p: KernelMachine.load(p, network())):
                with refused("no such file" if name != MANIFEST else r"has no manifest\.json"):
                    ask(machine)
        path.rmdir() if kind == "directory" else path.unlink()
        kept.rename(path)
    verify(machine)


def test_a_second_stage_that_its_file_does_not_pay_for_is_refused(machine: Path, tmp_path: Path) -> None:
    """Pivots of 400 kB would ask for an identity of 40 GB."""
    groups, facts = read_group(machine / "chord-000000.safetensors")
    groups["rows"]["pivots"] = torch.arange(100_000, dtype=torch.int32)
    groups["rows"]["second_stage"] = torch.zeros(100_000, 0, dtype=torch.int8)
    groups["rows"]["stage_exponents"] = torch.zeros(0, dtype=torch.int8)
    facts["sketches"] = [["net.1.weight", 100_000, 1]]
    groups["query_right"], groups["query_right.exponents"] = {}, {}
    path = write_group(tmp_path / "x.safetensors", groups, facts)
    with refused("second stage of 100000 x 100000 in a file of"):
        read_packed(path, None)


def test_names_are_no_paths(machine: Path) -> None:
    for name in (
        "C:",
        "C:x",
        "nul\n",
        "-rf",
        "~",
        "$HOME",
        "a b",
        "ä",
        ".hidden",
        "manifest.json",
        "%2e%2e",
        "a" * 128,
    ):
        edit(machine, lambda m, n=name: m["files"].update({n: {"bytes": 0, "sha256": "0" * 64, "crc32c": ""}}))
        with refused("is not a plain file name$"):
            verify(machine)
        edit(machine, lambda m, n=name: m["files"].pop(n))
    verify(machine)
