"""Well-formed files that are no chords, nor of this machine: kind -> what makes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.reliability.hostile_tensors import Change, header, header_of, sealed
from tests.store.artifacts import CONSTANTS, DEEP, MIDDLE, WEIGHT, reseal

__all__ = ["CHORDS"]

LAST = "chord-000003.safetensors"


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
