"""Files that call themselves safetensors, and chords that are none: kind -> what makes one.

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
import safetensors.torch
import torch
from torch import Tensor

from tests.store.artifacts import CONSTANTS, DEEP, MIDDLE, WEIGHT, reseal

__all__ = ["CHORDS", "FILES", "HEADERS"]

Change = Callable[[Path], object]
LAST = "chord-000003.safetensors"


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

# chords that are well-formed files


def chord(edit: Callable[[dict[str, Tensor], dict[str, Any]], object], name: str = MIDDLE) -> Change:
    """A chord's tensors and facts are others."""

    def make(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        metadata = header_of(data).get("__metadata__", {})
        facts = json.loads(metadata.get("facts", "{}"))
        edit(tensors, facts)
        return safetensors.torch.save(tensors, {**metadata, "facts": json.dumps(facts)})

    return sealed(name, make)


def first_of(tensors: dict[str, Tensor], group: str) -> str:
    """A tensor of a group."""
    return next(name for name in sorted(tensors) if name.startswith(group + "/"))


def spoilt(name: str, value: float) -> Callable[[dict[str, Tensor], dict[str, Any]], object]:
    """The first number of a tensor, or of the first one of a group, is this."""

    def edit(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        key = name if name in tensors else first_of(tensors, name)
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value

    return edit


def shaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, Any]], object]:
    """A tensor, or the first one of a group, is another."""

    def edit(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        key = name if name in tensors else first_of(tensors, name)
        tensors[key] = change(tensors[key]).contiguous().clone()

    return edit


def fact(key: str, value: Any) -> Change:
    """A fact is another."""
    return chord(lambda tensors, facts: facts.update({key: value}))


def unreadable(text: str) -> Change:
    return header(lambda h: h.update(__metadata__={"facts": text}))


def sketch(change: Callable[[list[Any]], object]) -> Change:
    """The list of sketches is another."""
    return chord(lambda tensors, facts: change(facts["sketches"]))


def utf8(text: str | bytes) -> Change:
    """The names of examples are this."""
    data = text.encode() if isinstance(text, str) else text
    return chord(lambda t, f: t.update({"names/utf8": torch.frombuffer(bytearray(data), dtype=torch.uint8)}))


CHORDS: dict[str, Change] = {
    "no facts": header(lambda h: h.update(__metadata__={})),
    "facts that are torn": unreadable("{"),
    "facts that are a list": unreadable("[]"),
    "facts nested too deep": unreadable(DEEP),
    "facts with NaN": unreadable('{"index": NaN}'),
    **{
        f"{key} {value!r:.24}": fact(key, value)
        for key, values in {
            "index": (-1, 2, 2**63, 1.5, True, "1", None, [], 10**400),
            "first_step": (-1, 0, 2**63, 1.5, "1", None, 10**400),
            "last_step": (-1, 0, 2**70, 1.5, "1", None),
            "learning_time": ("x", None, [], 10**400),
            "sketches": (None, 1, "x", {}, [1], [[]], [["x"]], [["x", 1, 1]], [[WEIGHT, 2**40, 2**40]], []),
        }.items()
        for value in values
    },
    "a sketch of 2^62 rows": sketch(lambda s: s[0].__setitem__(1, 2**62)),
    "a sketch of 2^31 times a text": sketch(lambda s: s.append([1, 2**31, "I8"])),
    "a sketch of true rows": sketch(lambda s: s[0].__setitem__(1, True)),
    "a sketch of -1 rows": sketch(lambda s: s[0].__setitem__(1, -1)),
    "a sketch twice": sketch(lambda s: s.append(s[0])),
    "a sketch without a parameter": sketch(lambda s: s[0].__setitem__(0, "other")),
    "ids not sorted": chord(shaped("rows/example_ids", lambda t: t.flip(0))),
    "an id twice": chord(shaped("rows/example_ids", lambda t: torch.cat([t[:1], t[:-1]]))),
    "ids in floats": chord(shaped("rows/example_ids", lambda t: t.float())),
    "ids in two dimensions": chord(shaped("rows/example_ids", lambda t: t[None])),
    "an id too few": chord(shaped("rows/example_ids", lambda t: t[1:])),
    "rows of NaN": chord(spoilt("rows/rows", float("nan"))),
    "rows of infinity": chord(spoilt("rows/rows", float("inf"))),
    "a row too few": chord(shaped("rows/rows", lambda t: t[1:])),
    "a column too few": chord(shaped("rows/rows", lambda t: t[:, 1:])),
    "rows of integers": chord(shaped("rows/rows", lambda t: t.to(torch.int16))),
    "rows in one dimension": chord(shaped("rows/rows", lambda t: t.flatten())),
    "no rows": chord(lambda t, f: t.pop("rows/rows")),
    "no ids": chord(lambda t, f: t.pop("rows/example_ids")),
    "a rest of NaN": chord(spoilt("rows/rest", float("nan"))),
    "a rest too short": chord(shaped("rows/rest", lambda t: t[1:])),
    "no rest": chord(lambda t, f: t.pop("rows/rest")),
    "row exponents of floats": chord(shaped("rows/exponents", lambda t: t.float())),
    "row exponents too few": chord(shaped("rows/exponents", lambda t: t[1:])),
    "self inner products of integers": chord(shaped("rows/self_inner", lambda t: t.long())),
    "self inner products too few": chord(shaped("rows/self_inner", lambda t: t[1:])),
    "a preconditioner's scale of NaN": chord(spoilt("preconditioner.scale", float("nan"))),
    "a preconditioner's scale of infinity": chord(spoilt("preconditioner.scale", float("inf"))),
    "a preconditioner's scale of 10^300": chord(spoilt("preconditioner.scale", 1e300)),
    "a preconditioner's scale for nothing": chord(lambda t, f: t.pop(first_of(t, "preconditioner"))),
    "a preconditioner of another shape": chord(shaped("preconditioner", lambda t: t.flatten()[:1])),
    "exponents too many": chord(shaped("delta.exponents", lambda t: torch.cat([t, t]))),
    "exponents of floats": chord(shaped("delta.exponents", lambda t: t.float())),
    "a displacement of NaN": chord(shaped("delta", lambda t: torch.full(t.shape, float("nan")))),
    "a displacement of another shape": chord(shaped("delta", lambda t: t[:1])),
    "no displacement": chord(lambda t, f: [t.pop(n) for n in list(t) if n.startswith("delta")]),
    "a factor of NaN": chord(shaped("query_right", lambda t: torch.full(t.shape, float("nan")))),
    "a factor of another dimension": chord(shaped("query_right", lambda t: t[:, 1:])),
    "a factor of none": chord(lambda t, f: t.pop(first_of(t, "query_right"))),
    "a second stage of another shape": chord(shaped("rows/second_stage", lambda t: t[:, 1:])),
    "a second stage without pivots": chord(lambda t, f: t.pop("rows/pivots")),
    "pivots out of range": chord(spoilt("rows/pivots", 2**31 - 1)),
    "negative pivots": chord(spoilt("rows/pivots", -1)),
    "a pivot twice": chord(shaped("rows/pivots", lambda t: torch.cat([t[:1], t[:-1]]))),
    "pivots of floats": chord(shaped("rows/pivots", lambda t: t.float())),
    "start of NaN": chord(shaped("start", lambda t: torch.full(t.shape, float("nan"))), "chord-000000.safetensors"),
    "start of another shape": chord(shaped("start", lambda t: t[:1]), "chord-000000.safetensors"),
    "start of another dtype": chord(shaped("start", lambda t: t.double()), "chord-000000.safetensors"),
    "start of a parameter too few": chord(lambda t, f: t.pop(first_of(t, "start")), "chord-000000.safetensors"),
    "start of a parameter too many": chord(
        lambda t, f: t.update({"start/x": torch.zeros(3)}), "chord-000000.safetensors"
    ),
    "an end of another shape": chord(shaped("end", lambda t: t[:1]), LAST),
    "an end and a displacement": chord(lambda t, f: t.update({"delta/x": torch.zeros(3)}), LAST),
    "buffers of another shape": chord(shaped("end_buffers", lambda t: t[:1])),
    "buffers too few": chord(lambda t, f: t.pop(first_of(t, "end_buffers"))),
    "the first chord in place of another": lambda machine: (
        (machine / MIDDLE).write_bytes((machine / "chord-000000.safetensors").read_bytes()),
        reseal(machine),
    ),
    "names that are not UTF-8": utf8(b"\xff\xfe"),
    "names that are no object": utf8("[]"),
    "names nested too deep": utf8(DEEP),
    "an example with two names": utf8('{"1":"a","1":"b"}'),
    "a name that is a number": utf8('{"1":1}'),
    "a name of no integer": utf8('{"x":"a"}'),
    "a name of 2^63": utf8(f'{{"{2**63}":"a"}}'),
    "names in floats": chord(lambda t, f: t.update({"names/utf8": torch.zeros(4)})),
    "constants too few": chord(lambda t, f: t.pop(sorted(t)[0]), CONSTANTS),
    "constants too many": chord(lambda t, f: t.update(x=torch.zeros(3)), CONSTANTS),
    "constants of another shape": chord(lambda t, f: t.update({k: v.flatten()[:1] for k, v in t.items()}), CONSTANTS),
    "constants of another dtype": chord(lambda t, f: t.update({k: v.double() for k, v in t.items()}), CONSTANTS),
}
