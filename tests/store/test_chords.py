"""Chords as files: bit for bit there and back, and nothing that does not fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import chord_name, read_chord, write_chord
from lightning_pathkernel.sketch import KroneckerSketch
from lightning_pathkernel.store import read_group, write_group
from tests.store.artifacts import DEEP, WEIGHT, recorded, refused


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(found: Chord, expected: Chord) -> None:
    for field in fields(Chord):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "sketches":
            assert list(a) == list(b), "features are laid out in this order"
            assert [(s.rows, s.columns) for s in a.values()] == [(s.rows, s.columns) for s in b.values()]
            a, b = ({f"{n}/{k}": t for n, s in x.items() for k, t in s.tensors().items()} for x in (a, b))
        if isinstance(b, dict) and field.name != "names":
            assert a.keys() == b.keys(), field.name
            assert all(a[n].shape == b[n].shape and same_bits(a[n], b[n]) for n in b), field.name
        elif isinstance(b, Tensor):
            assert a.shape == b.shape, field.name
            assert same_bits(a, b), field.name
        else:
            assert a == b, field.name


def odd_chord() -> Chord:
    """Numbers that a text format or a sum would lose, a scalar parameter, names that do not sort, nothing optional."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324, 0.1, -float("inf")], dtype=torch.float64)
    shapes = {"z.weight": (2, 3), "a/b": (6,), "scale": ()}
    sketches = {n: KroneckerSketch(s[0] if s else 1, s[1] if len(s) > 1 else 1) for n, s in shapes.items()}
    weights = {n: odd[: 1 if not s else 6].reshape(s) for n, s in shapes.items()}
    rows = odd.repeat(26)[: 2 * 13].reshape(2, 13)
    names = {2**62: "", 4: 'ü/\u65e5\n"', -(2**63): "\x00", 2**63 - 1: "null"}
    ids = torch.tensor([4, 2**62])
    return Chord(
        3, 7, 9, 0.1 + 0.2, ids, rows, odd[:2], sketches, None, weights, weights, {}, {}, names=names
    )  # fmt: skip


def test_chords_come_back_bit_for_bit(run: Path, tmp_path: Path) -> None:
    chords = [odd_chord(), *(read_chord(recorded(run / "recording", i)) for i in range(3))]
    assert chords[1].second_stage is not None
    assert all(getattr(chords[2], part) for part in ("preconditioner", "decay", "residual", "start_buffers"))
    for chord in chords:
        path = write_chord(tmp_path, replace(chord, index=chord.index + 10))
        assert path.name == chord_name(chord.index + 10)
        assert_same(read_chord(path), replace(chord, index=chord.index + 10))


def test_names_are_kept_when_examples_are_left_out_and_absent_where_there_are_none(run: Path, tmp_path: Path) -> None:
    groups, _ = read_group(recorded(run / "recording", 0))
    assert "names" not in groups
    chord = replace(read_chord(recorded(run / "recording", 0)), names={7: "seven"})
    assert chord.without(chord.example_ids[:3]).names == {7: "seven"}
    groups, _ = read_group(write_chord(tmp_path, chord))
    assert bytes(groups["names"]["utf8"].tolist()) == b'{"7":"seven"}'


Groups = dict[str, dict[str, Tensor]]
Z = torch.zeros


def put(group: str, name: str, value: Tensor) -> Callable[[Groups, dict], object]:
    return lambda groups, facts: groups.setdefault(group, {}).update({name: value})


def to(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Groups, dict], object]:
    return lambda groups, facts: groups["rows"].update({name: change(groups["rows"][name])})


def drop(group: str, name: str | None = None) -> Callable[[Groups, dict], object]:
    return lambda groups, facts: groups.pop(group) if name is None else groups[group].pop(name)


def fact(key: str, value: object) -> Callable[[Groups, dict], object]:
    return lambda groups, facts: facts.update({key: value})


def sketched(rows: object, columns: object) -> Callable[[Groups, dict], object]:
    return lambda groups, facts: facts["sketches"][0].__setitem__(slice(1, 3), [rows, columns])


def named(text: str | bytes) -> Callable[[Groups, dict], object]:
    data = text.encode() if isinstance(text, str) else text
    return put("names", "utf8", torch.tensor(list(data), dtype=torch.uint8))


MISFITS = {
    "names that are no UTF-8": named(b'{"1": "\xff"}'),
    "names that are no JSON": named('{"1": '),
    "names that are empty": named(""),
    "names that are a list": named('["a"]'),
    "names that are nested without end": named(DEEP),
    "names of another type": put("names", "utf8", torch.arange(3)),
    "names of two dimensions": put("names", "utf8", torch.zeros(2, 2, dtype=torch.uint8)),
    "names under another name": put("names", "utf16", torch.zeros(2, dtype=torch.uint8)),
    "a name for what is no integer": named('{"a": "b"}'),
    "a name for an integer not in plain decimal": named('{"01": "b"}'),
    "a name for an integer in other digits": named('{"\u0661": "b"}'),
    "a name for a fraction": named('{"1.0": "b"}'),
    "a name for an integer of 65 bits": named('{"9223372036854775808": "b"}'),
    "a name for an integer of a million digits": named('{"' + "1" * 1_000_000 + '": "b"}'),
    "a name that is a number": named('{"1": 2}'),
    "a name that is null": named('{"1": null}'),
    "a name that is a table": named('{"1": {}}'),
    "two names for one integer": named('{"1": "a", "1": "b"}'),
    "no rows": drop("rows"),
    "no example ids": drop("rows", "example_ids"),
    "no self inner products": drop("rows", "self_inner"),
    "no second stage": drop("rows", "second_stage"),
    "no displacement": drop("delta"),
    "no displacement of a parameter": drop("delta", WEIGHT),
    "no start": drop("start"),
    "no start of a parameter": drop("start", WEIGHT),
    "rows of another width": to("rows", lambda rows: rows[:, 1:]),
    "rows of one dimension": to("rows", lambda rows: rows[:, 0]),
    "more rows than ids": put("rows", "example_ids", torch.arange(3)),
    "ids of no dimension": put("rows", "example_ids", torch.tensor(3)),
    "ids of two dimensions": to("example_ids", lambda ids: ids[:, None]),
    "ids that are no integers": to("example_ids", Tensor.float),
    "self inner products of another number": put("rows", "self_inner", Z(3)),
    "second stage of another width": put("rows", "second_stage", Z(32, 5)),
    "second stage of no dimension": put("rows", "second_stage", Z(())),
    "second stage of one dimension": put("rows", "second_stage", Z(32)),
    "second stage of three dimensions": to("second_stage", lambda stage: stage[:, :, None]),
    "start of another shape": put("start", WEIGHT, Z(3, 3)),
    "displacement of another shape": put("delta", WEIGHT, Z(3, 3)),
    "displacement of integers": put("delta", WEIGHT, Z(12, 64, dtype=torch.int32)),
    "preconditioner of another shape": put("preconditioner", WEIGHT, Z(3, 3)),
    "decay of another shape": put("decay", WEIGHT, Z(3, 3)),
    "residual of another shape": put("residual", WEIGHT, Z(3, 3)),
    "decay of an unknown parameter": put("decay", "nope", Z(3)),
    "buffers of another shape at the end": put("end_buffers", "net.2.running_mean", Z(3)),
    "no buffers at the end": drop("end_buffers"),
    "factor of no dimension": put("query_left", WEIGHT, Z(())),
    "factor of three dimensions": put("query_left", WEIGHT, Z(12, 12, 1)),
    "query factor of another width": put("query_right", WEIGHT, Z(16, 63)),
    "query factor of another number of rows": put("query_right", WEIGHT, Z(15, 64)),
    "no query factors": drop("query_right"),
    "another number of rows": sketched(13, 64),
    "another number of columns": sketched(12, 65),
    "negative sizes": sketched(-12, -64),
    "sizes that are no numbers": sketched("12", None),
    "no sketches": fact("sketches", []),
    "sketches that are no list": fact("sketches", 5),
    "sketches without sizes": fact("sketches", [["a"]]),
    "facts that are no dictionary": lambda groups, facts: facts.clear(),
    "index that is no number": fact("index", "x"),
    "infinite index": fact("index", float("inf")),
    "infinite step": fact("first_step", float("inf")),
    "time that is no number": fact("learning_time", None),
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_of_a_chord_that_do_not_fit_are_refused(name: str, run: Path, tmp_path: Path) -> None:
    groups, facts = read_group(recorded(run / "recording", 1))
    MISFITS[name](groups, facts)
    path = write_group(tmp_path / "x.safetensors", groups, facts)
    with refused(r"^x\.safetensors: "):
        read_chord(path)
