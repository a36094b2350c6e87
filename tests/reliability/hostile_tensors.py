"""Files that call themselves safetensors: kind -> what makes one.

Whoever made the change made the manifest too: its sizes and checksums are those of the file.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.store.artifacts import DEEP, MIDDLE, reseal

__all__ = ["FILES", "HEADERS", "Change", "header", "header_of", "sealed"]

Change = Callable[[Path], object]


def header_of(data: bytes) -> dict[str, Any]:
    """A file's header."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def safetensors_of(header: object, data: bytes = b"") -> bytes:
    """A file of a header, as JSON or as bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sealed(name: str, make: Callable[[bytes], bytes]) -> Change:
    """A file of the artifact is another one, and the manifest says so."""

    def change(machine: Path) -> None:
        (machine / name).write_bytes(make((machine / name).read_bytes()))
        reseal(machine)

    return change


def header(edit: Callable[[dict[str, Any]], object], name: str = MIDDLE) -> Change:
    """The header says something else of the same data."""

    def make(data: bytes) -> bytes:
        found = header_of(data)
        edit(found)
        return safetensors_of(found, data[8 + int.from_bytes(data[:8], "little") :])

    return sealed(name, make)


def entry(key: str, value: Any) -> Change:
    """The first tensor's entry says something else."""
    return header(lambda h: h[next(n for n in h if n != "__metadata__")].update({key: value}))


def swapped(found: dict[str, Any]) -> None:
    """Two tensors overlap, and leave a gap."""
    names = [n for n in found if n != "__metadata__" and found[n]["data_offsets"][1] > found[n]["data_offsets"][0]]
    found[names[0]]["data_offsets"] = list(found[names[1]]["data_offsets"])


def many(count: int, empty: bool) -> bytes:
    """A legal header of many tensors."""
    size = 0 if empty else 4
    text = ",".join(
        f'"{i}":{{"dtype":"F32","shape":[{0 if empty else 1}],"data_offsets":[{i * size},{i * size + size}]}}'
        for i in range(count)
    )
    return safetensors_of(f"{{{text}}}".encode(), bytes(count * size))


def zipped(level: int) -> bytes:
    """100 MB of zeros in a few kilobytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as file:
        file.writestr("data.pkl", bytes(100 << 20))
    return out.getvalue()


def numpy_of() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return out.getvalue()


def torch_of() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, out)
    return out.getvalue()


class _Bomb:
    def __reduce__(self) -> Any:
        return eval, ("open('/tmp/pathkernel-was-here', 'w')",)


FILES: dict[str, Change] = {
    name: sealed(MIDDLE, lambda data, make=make: make())  # type: ignore[misc]
    for name, make in {
        "empty": lambda: b"",
        "shorter than a header": lambda: b"abc",
        "zeros": lambda: bytes(4096),
        "a pickle": lambda: pickle.dumps(_Bomb()),
        "a pickle in place of the header": lambda: safetensors_of(pickle.dumps(_Bomb())),
        "a zip bomb": lambda: zipped(9),
        "a zlib bomb in place of the header": lambda: safetensors_of(zlib.compress(bytes(100 << 20), 9)),
        "a file of torch.save": torch_of,
        "a file of numpy with pickles": numpy_of,
        "a program": lambda: b"\x7fELF" + bytes(1000),
        "a header of 2^63 bytes": lambda: struct.pack("<Q", 1 << 63) + b"{}",
        "a header of 2^64 - 1 bytes": lambda: struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "a header longer than the file": lambda: struct.pack("<Q", 1000) + b"{}",
        "no header": lambda: safetensors_of(b""),
        "a header that is a list": lambda: safetensors_of([]),
        "a header that is a number": lambda: safetensors_of(1),
        "a header that is not UTF-8": lambda: safetensors_of(b"\xff" * 8),
        "a header nested too deep": lambda: safetensors_of(DEEP.encode()),
        "a header of 33 MB with 500,000 tensors": lambda: many(500_000, empty=True),
        "a header of 15 MB with 250,000 tensors": lambda: many(250_000, empty=True),
        "40,000 tensors of four bytes": lambda: many(40_000, empty=False),
        "a header of 16 MB of spaces": lambda: safetensors_of(b"{}" + b" " * ((16 << 20) - 2)),
        "metadata of 15 MB": lambda: safetensors_of({"__metadata__": {"facts": "x" * (15 << 20)}}),
        "500,000 metadata": lambda: safetensors_of({"__metadata__": {str(i): "" for i in range(500_000)}}),
        "no tensors": lambda: safetensors_of({"__metadata__": {"facts": "{}"}}),
    }.items()
}

HEADERS: dict[str, Change] = {
    **{
        f"{key} {value!r:.24}": entry(key, value)
        for key, values in {
            "dtype": ("F33", "F4", "object", "", "f32", None, 1, [], {}),
            "shape": (
                None,
                "12",
                12,
                [-1],
                [1.5],
                [True],
                ["1"],
                [[1]],
                [10**400],
                [10**9, 0],
                [2**62, 0],
                [2**62, 2**62],
                [2**32, 2**32],
                [1] * 100_000,
                {},
                [0],
            ),
            "data_offsets": (
                None,
                [],
                [0],
                [0, 1, 2],
                [0, -1],
                [-4, 0],
                [0.0, 4.0],
                [False, True],
                ["0", "4"],
                [8, 4],
                [0, 10**400],
                [2**63, 2**63],
                [0, 2**62],
                {},
                0,
            ),
        }.items()
        for value in values
    },
    "tensors that overlap": header(swapped),
    "an entry that is a list": header(lambda h: h.update(x=[])),
    "an entry that is null": header(lambda h: h.update(x=None)),
    "an entry without dtype": header(lambda h: h[next(n for n in h if n != "__metadata__")].pop("dtype")),
    "an entry without offsets": header(lambda h: h[next(n for n in h if n != "__metadata__")].pop("data_offsets")),
    "a tensor that is not there": header(
        lambda h: h.update(x={"dtype": "F32", "shape": [9], "data_offsets": [1 << 40, (1 << 40) + 36]})
    ),
    "a tensor of [10^9, 0]": header(
        lambda h: h.update({"start/x": {"dtype": "F32", "shape": [10**9, 0], "data_offsets": [0, 0]}})
    ),
    "data left over": sealed(MIDDLE, lambda data: data + b"more"),
    "data missing": sealed(MIDDLE, lambda data: data[:-4]),
    "metadata that are a list": header(lambda h: h.update(__metadata__=[])),
    "metadata that are numbers": header(lambda h: h.update(__metadata__={"facts": 1})),
    "metadata within metadata": header(lambda h: h.update(__metadata__={"facts": {"index": 1}})),
    "a key twice": sealed(MIDDLE, lambda d: safetensors_of(b'{"a":{},"a":{}}')),
    "NaN in the header": sealed(MIDDLE, lambda d: safetensors_of(b'{"a":NaN}')),
    **{
        f"a tensor named {name!r:.30}": header(
            lambda h, name=name: h.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
        )
        for name in (
            "../../x",
            "/etc/passwd",
            "start/../../x",
            "start/a\0b",
            "x\ny",
            "",
            "x" * 100_000,
            "start/__class__",
        )
    },
}
