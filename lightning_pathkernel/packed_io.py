"""A path's chords to and from the files of an artifact, in few bytes.

A recording holds every number as it was; an artifact holds what questions to a machine need, in formats of `packing`:

- nodes: the first one as it is, then each chord's displacement in eight bits, taken from the node that the rounded
  displacements before it lead to, so that rounding never adds up; the last node as it is, so that the network that the
  machine stands for is the one that was trained, to the last bit;
- rows in float16 (or in eight bits), their sum kept, the preconditioner in sixteen bits of its logarithm, decay and
  residual in eight bits, but a residual that is the whole displacement by its name alone;
- the query side of both stages of the sketch, which the recorder has rounded to eight bits already (`sketch.rounding`).

The machine's ledger is taken along the path as stored, with the numbers as stored: what rounding costs is in its
``sketch`` term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import FACTORS, MALFORMED, check_parts, chord_facts, chord_name, sketches_of
from lightning_pathkernel.example_rows import ExampleRows
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.packing import (
    Groups,
    pack_blocks,
    pack_integers,
    pack_logarithms,
    pack_rows,
    unpack,
)
from lightning_pathkernel.sketch import KroneckerSketch, from_grid, pivots_of, to_grid
from lightning_pathkernel.store import ArtifactError, CheckedFile, TensorFile, facts_of, write_group
from lightning_pathkernel.stored_chord import StoredChord
from lightning_pathkernel.stored_rows import StoredRows

__all__ = ["EXAMPLES", "Node", "read_packed", "read_parts", "write_packed", "write_reduced"]

EXAMPLES = ("example_ids", "rows", "self_inner", "exponents", "rest", "row_exponents")
"""Tensors of the group ``rows`` that hold examples; the others are the sketch's second stage."""
_STAGE_BYTES = 64 << 20
"""A second stage's map in memory may take so much, or 64 times the file that it comes from."""


@dataclass(frozen=True)
class Node:
    """Where a path stands, as far as an artifact's files tell: weights and floating-point buffers."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


def write_packed(directory: Path, chord: Chord, before: Node | None, last: bool, row_bits: int = 16) -> Node:
    """Publish a chord as part of an artifact; nothing is overwritten.

    Args:
        directory: Where.
        chord: What.
        before: The node at which it begins, as `write_packed` of the chord before returned it; None for the first one.
        last: Whether the path ends with it.
        row_bits: Bits of a row's number, 8 or 16.

    Returns:
        The node at which it ends.

    Raises:
        ArtifactError: If a number of it is not finite: nobody could load it.
    """
    known = before or Node({}, {})
    start = {name: known.weights.get(name, weight) for name, weight in chord.start.items()}
    groups: Groups = {"start": {name: weight for name, weight in start.items() if name not in known.weights}}
    end = chord.weights(1.0)
    if last:
        groups["end"] = end
    else:
        pack_blocks("delta", {name: end[name] - weight for name, weight in start.items()}, groups)
        delta = unpack("delta", groups)
        end = {name: weight + delta[name] for name, weight in start.items()}
    if not _same(chord.start_buffers, known.buffers):
        groups["start_buffers"] = dict(chord.start_buffers)
    groups["end_buffers"] = dict(chord.end_buffers)
    pack_logarithms("preconditioner", chord.preconditioner, groups)
    whole = [name for name, value in chord.residual.items() if torch.equal(value, chord.delta[name])]
    pack_blocks("decay", {n: v for n, v in chord.decay.items() if bool(v.any())}, groups)
    pack_blocks("residual", {n: v for n, v in chord.residual.items() if n not in whole and bool(v.any())}, groups)
    _pack_sketches(chord, groups)
    groups["rows"] = {
        "example_ids": pack_integers(chord.example_ids), "self_inner": chord.self_inner,
        **pack_rows(chord.rows, row_bits), **_packed_stage(chord.second_stage),
    }  # fmt: skip
    _check_writable(chord_name(chord.index), groups)
    if chord.names:
        groups["names"] = {"utf8": encode_names(chord.names)}
    write_group(directory / chord_name(chord.index), groups, {**chord_facts(chord), "unattributed": whole})
    return Node(end, dict(chord.end_buffers))


def _check_writable(file: str, groups: Groups) -> None:
    for group in ("start", "end", "delta", "preconditioner", "decay", "residual", *FACTORS, "rows"):
        for name, value in groups.get(group, {}).items():
            if value.is_floating_point() and name != "self_inner" and not bool(value.isfinite().all()):
                raise ArtifactError(f"{file}: {group}/{name} is not finite: the recording cannot be exported")


def write_reduced(directory: Path, file: TensorFile, chord: StoredChord, kept: ExampleRows, gone: Tensor) -> None:
    """Publish a chord of an artifact without some of its examples; all that stays is copied as it is stored.

    Args:
        directory: Where.
        file: The chord's file.
        chord: The chord, already without them: their displacement is part of its residual.
        kept: Its examples without them.
        gone: Ids that were left out, of this chord or others.
    """
    groups: Groups = {}
    for full in file.entries:
        group, _, name = full.partition("/")
        if group != "names" and not (group == "rows" and name in EXAMPLES):
            groups.setdefault(group, {})[name] = file.get(full)
    groups.setdefault("rows", {}).update(StoredRows(file).codes(gone))
    names = {key: name for key, name in chord.names.items() if not bool((gone == key).any())}
    if names:
        groups["names"] = {"utf8": encode_names(names)}
    facts = facts_of(file)
    if chord.examples is kept:  # it lost some
        whole = [name for name in facts["unattributed"] if name not in chord.sketches]
        for group in ("residual", "residual.exponents"):
            groups.pop(group, None)
        # as it is: beside rows that cancel, their displacement may be much larger than what is left of it
        groups["residual"] = {n: v for n, v in chord.residual.items() if n not in whole and bool(v.any())}
        facts["unattributed"] = whole
    write_group(directory / file.name, groups, facts)


def _same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def _on_grid(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and exponents of a matrix that was rounded before, or None where they would not give it back exactly."""
    if matrix.dtype is not torch.float32 or matrix.dim() != 2 or not bool(matrix.isfinite().all()):
        return None
    codes, exponents = to_grid(matrix)
    return (codes, exponents) if torch.equal(from_grid(codes, exponents), matrix) else None


def _pack_sketches(chord: Chord, groups: Groups) -> None:
    for kind in FACTORS:
        for name, sketch in chord.sketches.items():
            factor = getattr(sketch, kind)
            if factor is None:
                continue
            packed = _on_grid(factor)
            groups.setdefault(kind, {})[name] = factor if packed is None else packed[0]
            if packed is not None:
                groups.setdefault(f"{kind}.exponents", {})[name] = packed[1]


def _packed_stage(stage: Tensor | None) -> dict[str, Tensor]:
    if stage is None:
        return {}
    pivots = pivots_of(stage)
    packed = None if pivots is None else _on_grid(stage[:, _others(pivots, stage.shape[1])])
    if pivots is None or packed is None:
        return {"second_stage": stage}
    return {"second_stage": packed[0], "stage_exponents": packed[1], "pivots": pivots.to(torch.int32)}


def _others(pivots: Tensor, count: int) -> Tensor:
    free = torch.ones(count, dtype=torch.bool)
    free[pivots.cpu()] = False
    return free.nonzero().flatten().to(pivots.device)


def read_packed(path: Path, before: Node | None) -> tuple[Chord, Node]:
    """Read a chord of an artifact back, its examples too, with nothing that vouches for the file.

    Args:
        path: A file that `write_packed` wrote.
        before: The node at which it begins; None for the first one.

    Returns:
        The chord, on the CPU, without the training side of its sketch; and the node at which it ends.

    Raises:
        ArtifactError: If the file is damaged, or its parts do not fit together.
    """
    file = TensorFile(CheckedFile(path))
    try:
        names = decode_names(file.get("names/utf8")) if "names" in file.groups() else {}
        chord, node = read_parts(file, before, StoredRows(file), {}, lambda: names)
        return chord.held(), node
    except MALFORMED as error:
        raise ArtifactError(f"{path.name}: not a chord: {error!r}") from error
    finally:
        file.file.close()


def read_parts(
    file: TensorFile,
    before: Node | None,
    examples: ExampleRows,
    later: Mapping[str, Tensor],
    names: Callable[[], Mapping[int, str]],
) -> tuple[StoredChord, Node]:
    """Read a chord of an artifact, all but its examples.

    Args:
        file: The chord's file.
        before: The node at which it begins; None for the first one.
        examples: Its examples.
        later: Parameters that begin to learn in later chords, where they stand until then.
        names: Reads its names.

    Returns:
        The chord, and the node at which it ends.

    Raises:
        ArtifactError: If the file is damaged, or its parts do not fit together.
    """
    try:
        groups: Groups = {}
        for full in file.entries:
            group, _, name = full.partition("/")
            if group != "names" and not (group == "rows" and name in EXAMPLES):
                groups.setdefault(group, {})[name] = file.get(full)
        chord = _assembled(groups, file, before or Node({}, {}), examples, names)
    except ArtifactError:
        raise
    except (*MALFORMED, RuntimeError) as error:  # torch's own for what does not fit
        raise ArtifactError(f"{file.name}: not a chord: {error!r}") from error
    node = Node(chord.weights(1.0), dict(chord.end_buffers))
    return replace(chord, start={**later, **chord.start}), node


def _assembled(
    groups: Groups, file: TensorFile, known: Node, examples: ExampleRows, names: Callable[[], Mapping[int, str]]
) -> StoredChord:
    facts = facts_of(file)
    start = {**known.weights, **groups.get("start", {})}
    end = groups.get("end", {})
    if end and (end.keys() != start.keys() or "delta" in groups):
        raise ValueError("the weights at the end are not those of the start, or beside a displacement")
    _check_like("end", end, start)
    delta = {name: end[name] - weight for name, weight in start.items()} if end else unpack("delta", groups)
    residual = {**unpack("residual", groups), **{name: delta[name] for name in facts["unattributed"]}}
    chord = StoredChord(
        int(facts["index"]), int(facts["first_step"]), int(facts["last_step"]), float(facts["learning_time"]),
        examples, _unpacked_sketches(groups, facts), None, start, delta,
        groups.get("start_buffers", known.buffers), groups.get("end_buffers", {}),
        unpack("preconditioner", groups), unpack("decay", groups), residual, end, names,
    )  # fmt: skip
    features = sum(sketch.features for sketch in chord.sketches.values())
    chord = replace(chord, second_stage=_unpacked_stage(groups.get("rows", {}), features, file.file.size))
    width = check_parts(chord)
    if examples.width != width:
        raise ValueError(f"rows of {examples.width} numbers, expected {width}")
    _check_dtypes(chord, examples.dtype)
    _check_finite(chord)
    return chord


def _check_dtypes(chord: StoredChord, rows: torch.dtype) -> None:
    """All that meets in a product must be of one dtype; a network whose weights are of several is on its own."""
    kinds = {weight.dtype for weight in chord.start.values()}
    found = {value.dtype for sketch in chord.sketches.values() for value in sketch.tensors().values()} | {rows}
    found |= set() if chord.second_stage is None else {chord.second_stage.dtype}
    if len(kinds) == 1 and found != kinds:
        raise ValueError(f"rows and sketches of {sorted(map(str, found))} for weights of {sorted(map(str, kinds))}")


def _check_finite(chord: StoredChord) -> None:
    """Buffers may hold infinities (masks do); what the path is made of may not."""
    maps = {"start": chord.start, "delta": chord.delta, "preconditioner": chord.preconditioner, "decay": chord.decay,
            "residual": chord.residual}  # fmt: skip
    maps |= {f"factor of {name!r}": sketch.tensors() for name, sketch in chord.sketches.items()}
    if chord.second_stage is not None:
        maps["second stage"] = {"all": chord.second_stage}
    for kind, values in maps.items():
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{kind}: {name!r} is not finite")


def _check_like(kind: str, values: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            raise ValueError(f"{kind} of {name!r} does not fit")


def _unpacked_sketches(groups: Groups, facts: dict[str, Any]) -> dict[str, KroneckerSketch]:
    factors: dict[str, dict[str, Tensor]] = {}
    for kind in FACTORS:
        codes, exponents = groups.get(kind, {}), groups.get(f"{kind}.exponents", {})
        if not exponents.keys() <= codes.keys():
            raise ValueError(f"exponents of {kind} for no factors")
        factors[kind] = {n: _unpacked(n, c, exponents[n]) if n in exponents else c for n, c in codes.items()}
    return sketches_of(facts["sketches"], factors)


def _unpacked(name: str, codes: Tensor, exponents: Tensor) -> Tensor:
    if codes.dtype is not torch.int8 or exponents.dtype is not torch.int8 or codes.dim() != 2:
        raise ValueError(f"factor of {name!r} of {codes.dtype} {tuple(codes.shape)}, exponents of {exponents.dtype}")
    if exponents.shape != codes.shape[1:]:
        raise ValueError(f"factor of {name!r} of {tuple(codes.shape)} with {tuple(exponents.shape)} exponents")
    return from_grid(codes, exponents)


def _unpacked_stage(stored: dict[str, Tensor], features: int, file_size: int) -> Tensor | None:
    """The second stage's query map, whose size is checked before it is allocated."""
    codes, exponents, pivots = (stored.get(name) for name in ("second_stage", "stage_exponents", "pivots"))
    if codes is None or (exponents is None and pivots is None):
        return codes
    if exponents is None or pivots is None or pivots.dtype is not torch.int32 or pivots.dim() != 1:
        raise ValueError("second stage without its exponents or pivots")
    k = len(pivots)
    if 4 * k * features > max(_STAGE_BYTES, 64 * file_size):
        raise ValueError(f"second stage of {k} x {features} in a file of {file_size} bytes")
    if codes.shape != (k, features - k) or len(torch.unique(pivots)) != k:
        raise ValueError(f"second stage of {tuple(codes.shape)} with {k} pivots for {features} features")
    if k and not 0 <= int(pivots.min()) <= int(pivots.max()) < features:
        raise ValueError(f"pivots beyond {features} features")
    free = _unpacked("second stage", codes, exponents)
    stage = free.new_zeros(k, features)
    stage[:, pivots.long()] = torch.eye(k)
    stage[:, _others(pivots.long(), features)] = free
    return stage
