"""A reader written from docs/format.md alone: numpy, json and struct, nothing of the package, torch or safetensors."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
FORMAT, MAJOR, CHUNK = "lightning_pathkernel.machine", 1, 1 << 20
Arrays = dict[str, np.ndarray]


def crc32c(data: bytes) -> int:
    """Castagnoli's, a bit at a time for every possible byte, then byte by byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def read_manifest(directory: Path) -> dict:
    """The manifest, and every file held against it."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == FORMAT
    assert manifest["version"][0] == MAJOR
    assert manifest["required_features"] == []
    assert sorted(p.name for p in directory.iterdir()) == sorted(["manifest.json", *manifest["files"]])
    for name, facts in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert len(data) == facts["bytes"]
        assert hashlib.sha256(data).hexdigest() == facts["sha256"]
        if manifest["version"][1] >= 1:
            assert manifest["chunk_bytes"] == CHUNK
            sums = "".join(f"{crc32c(data[i : i + CHUNK]):08x}" for i in range(0, len(data), CHUNK))
            assert sums == facts["crc32c"]
    return manifest


def tensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """A safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata, body, out = header.pop("__metadata__", {}), data[8 + length :], {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        out[name] = np.frombuffer(body[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out, metadata


def group(found: Arrays, kind: str) -> Arrays:
    return {name.partition("/")[2]: value for name, value in found.items() if name.partition("/")[0] == kind}


def powers(exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(1.0, exponents.astype(int))


def blocks(found: Arrays, kind: str) -> Arrays:
    """Groups `delta`, `decay` and `residual`."""
    out, scales = {}, group(found, f"{kind}.exponents")
    for name, codes in group(found, kind).items():
        out[name] = codes
        if name in scales:
            each = np.repeat(powers(scales[name]), 64)[: codes.size]
            out[name] = (codes.reshape(-1) * each).reshape(codes.shape).astype(np.float32)
    return out


def logarithms(found: Arrays, kind: str) -> Arrays:
    """Group `preconditioner`."""
    out, scales = {}, group(found, f"{kind}.scale")
    for name, codes in group(found, kind).items():
        out[name] = codes
        if name in scales:
            least, step = scales[name]
            values = np.exp2(least + (codes.astype(np.float64) + 32767) * step)
            out[name] = np.where(codes == -32768, 0, values).astype(np.float32)
    return out


def columns(codes: np.ndarray, exponents: np.ndarray | None) -> np.ndarray:
    return codes if exponents is None else (codes * powers(exponents)).astype(np.float32)


def rows(found: Arrays) -> np.ndarray:
    """What is stored of each example, ``[V, k]``."""
    codes, exponents = found["rows/rows"], found.get("rows/exponents")
    if exponents is None:
        return codes
    out = codes.astype(np.float64) * powers(exponents)
    if codes.dtype == np.int8:
        out *= powers(found["rows/row_exponents"])[:, None]
    out[np.abs(out).max(1).argmax()] += found["rows/rest"]
    return out.astype(np.float32)


def second_stage(found: Arrays) -> np.ndarray | None:
    codes, pivots = found.get("rows/second_stage"), found.get("rows/pivots")
    if codes is None or pivots is None:
        return codes
    out = np.zeros((len(pivots), codes.shape[1] + len(pivots)), np.float32)
    out[np.arange(len(pivots)), pivots] = 1
    out[:, np.setdiff1d(np.arange(out.shape[1]), pivots)] = columns(codes, found["rows/stage_exponents"])
    return out


def chord(path: Path, weights: Arrays, buffers: Arrays) -> dict:
    """A chord, and what its last node leaves for the next one: ``weights`` and ``buffers`` are brought up to date."""
    found, metadata = tensors(path)
    facts = json.loads(metadata["facts"])
    start = {**weights, **group(found, "start")}
    end, delta = group(found, "end"), blocks(found, "delta")
    if end:
        delta = {name: end[name] - start[name] for name in start}
    else:
        end = {name: start[name] + delta[name] for name in start}
    start_buffers = group(found, "start_buffers") or dict(buffers)
    end_buffers = group(found, "end_buffers")
    weights.update(end)
    buffers.clear()
    buffers.update(end_buffers)
    factors = {
        kind: {n: columns(c, group(found, f"{kind}.exponents").get(n)) for n, c in group(found, kind).items()}
        for kind in ("query_left", "query_right")
    }
    names = json.loads(found["names/utf8"].tobytes()) if "names/utf8" in found else {}
    return {
        "facts": facts, "start": start, "delta": delta, "end": end, "start_buffers": start_buffers,
        "end_buffers": end_buffers, "preconditioner": logarithms(found, "preconditioner"),
        "decay": blocks(found, "decay"),
        "residual": {**blocks(found, "residual"), **{n: delta[n] for n in facts["unattributed"]}},
        **factors, "second_stage": second_stage(found), "rows": rows(found), "names": names,
        "example_ids": found["rows/example_ids"].astype(np.int64), "self_inner": found["rows/self_inner"],
    }  # fmt: skip


def machine(directory: Path) -> list[dict]:
    """All chords of an artifact."""
    manifest, weights, buffers = read_manifest(directory), {}, {}
    return [chord(directory / name, weights, buffers) for name in manifest["chords"]]


def direction(found: dict) -> Arrays:
    """What the rows add up to, in weight space: the gradient's side of the formula, turned round."""
    total = found["rows"].sum(0, dtype=np.float64)
    if found["second_stage"] is not None:
        total = total @ found["second_stage"].astype(np.float64)
    out, at = {}, 0
    for name, r, c in found["facts"]["sketches"]:
        left, right = found["query_left"].get(name, np.eye(r)), found["query_right"].get(name, np.eye(c))
        features = total[at : at + len(left) * len(right)].reshape(len(left), len(right))
        at += features.size
        matrix = (left.T @ features @ right).reshape(found["start"][name].shape)
        out[name] = matrix * found["preconditioner"].get(name, 1)
    assert at == len(total)
    return out
