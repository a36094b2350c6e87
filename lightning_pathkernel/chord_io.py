"""A chord to and from one file, every number as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import PathChord
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.sketch import KroneckerSketch
from lightning_pathkernel.store import ArtifactError, read_group, write_group

Groups = Mapping[str, Mapping[str, torch.Tensor]]
"""Group -> name -> tensor."""

__all__ = [
    "FACTORS",
    "MALFORMED",
    "check_chord",
    "check_parts",
    "chord_facts",
    "chord_groups",
    "chord_name",
    "chord_of",
    "merged_chord",
    "rank_name",
    "read_chord",
    "sketches_of",
    "write_chord",
]

_MAPS = ("start", "delta", "start_buffers", "end_buffers", "preconditioner", "decay", "residual")
FACTORS = ("query_left", "query_right")
"""Factors of a sketch that are stored: the training side has done its work when a chord closes."""
MALFORMED = (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError)
"""What parts that do not fit together raise when a chord is put together from them."""


def chord_name(index: int) -> str:
    """File name of the chord with this index."""
    return f"chord-{index:06d}.safetensors"


def write_chord(directory: Path, chord: Chord) -> Path:
    """Publish a chord; nothing is overwritten.

    Args:
        directory: Where.
        chord: What.

    Returns:
        The file.
    """
    groups, facts = chord_groups(chord)
    return write_group(directory / chord_name(chord.index), groups, facts)


def chord_groups(chord: Chord, rank: int = 0) -> tuple[Groups, dict[str, Any]]:
    """A chord as groups of tensors and JSON-able facts.

    Args:
        chord: The chord.
        rank: The process whose rows these are; only the first one's has what all have in common.

    Returns:
        Both.
    """
    rows = {"example_ids": chord.example_ids, "rows": chord.rows, "self_inner": chord.self_inner}
    names = {"names": {"utf8": encode_names(chord.names)}} if chord.names else {}
    if rank:
        return {"rows": rows, **names}, {"index": chord.index}
    groups = {name: dict(getattr(chord, name)) for name in _MAPS} | names
    for factor in FACTORS:
        found = {name: getattr(sketch, factor) for name, sketch in chord.sketches.items()}
        groups[factor] = {name: t for name, t in found.items() if t is not None}
    groups["rows"] = rows
    if chord.second_stage is not None:
        groups["rows"]["second_stage"] = chord.second_stage
    return groups, chord_facts(chord)


def chord_facts(chord: Chord) -> dict[str, Any]:
    """What a chord's file says beside its tensors."""
    return {
        "index": chord.index,
        "first_step": chord.first_step,
        "last_step": chord.last_step,
        "learning_time": chord.learning_time,
        "sketches": [[name, sketch.rows, sketch.columns] for name, sketch in chord.sketches.items()],
    }


def rank_name(rank: int) -> str:
    """Folder of a recording that holds what one of its processes wrote."""
    return f"rank-{rank:04d}"


def merged_chord(chord: Chord, others: Mapping[str, Groups]) -> Chord:
    """A chord by several processes, with the rows of all of them added up by example.

    Args:
        chord: As the first one wrote it.
        others: File of another one -> what it wrote of the same chord.

    Returns:
        The chord.

    Raises:
        ArtifactError: If rows do not fit the chord.
    """
    ids, rows, inner, names = [chord.example_ids], [chord.rows], [chord.self_inner], dict(chord.names)
    for name, groups in others.items():
        found = groups.get("rows", {})
        if not {"example_ids", "rows", "self_inner"} <= found.keys() or found["rows"].shape[1:] != chord.rows.shape[1:]:
            raise ArtifactError(f"{name}: its rows are not of this chord")
        ids.append(found["example_ids"])
        rows.append(found["rows"])
        inner.append(found["self_inner"])
        names.update(_names(name, groups))
    if not others:
        return chord
    unique, inverse = torch.unique(torch.cat(ids), return_inverse=True)
    summed = chord.rows.new_zeros(len(unique), chord.rows.shape[1]).index_add_(0, inverse, torch.cat(rows))
    influences = chord.self_inner.new_zeros(len(unique)).index_add_(0, inverse, torch.cat(inner))
    return replace(chord, example_ids=unique, rows=summed, self_inner=influences, names=names)


def _names(called: str, groups: Groups) -> dict[int, str]:
    try:
        return decode_names(groups["names"]["utf8"]) if "names" in groups else {}
    except MALFORMED as error:
        raise ArtifactError(f"{called}: {error}") from error


def read_chord(path: Path) -> Chord:
    """Read a chord back.

    Args:
        path: A file that `write_chord` wrote.

    Returns:
        The chord, on the CPU, without the training side of its sketch.

    Raises:
        ArtifactError: If the file is damaged, or its parts do not fit together.
    """
    groups, facts = read_group(path)
    return chord_of(path.name, groups, facts)


def chord_of(called: str, groups: Groups, facts: Mapping[str, Any]) -> Chord:
    """A chord of what `chord_groups` made of it.

    Args:
        called: What an error calls it.
        groups: Its tensors.
        facts: Its facts.

    Returns:
        The chord, without the training side of its sketch.

    Raises:
        ArtifactError: If its parts do not fit together.
    """
    try:
        return _assemble(groups, facts)
    except MALFORMED as error:
        raise ArtifactError(f"{called}: not a chord: {error!r}") from error


def _assemble(groups: Groups, facts: Mapping[str, Any]) -> Chord:
    factors = {factor: groups.get(factor, {}) for factor in FACTORS}
    sketches = sketches_of(facts["sketches"], factors)
    stored = groups["rows"]
    maps: dict[str, Any] = {name: groups.get(name, {}) for name in _MAPS}
    chord = Chord(
        int(facts["index"]), int(facts["first_step"]), int(facts["last_step"]), float(facts["learning_time"]),
        stored["example_ids"], stored["rows"], stored["self_inner"], sketches, stored.get("second_stage"), **maps,
        names=decode_names(groups["names"]["utf8"]) if "names" in groups else {},
    )  # fmt: skip
    check_chord(chord)
    return chord


def sketches_of(listed: Any, factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, KroneckerSketch]:
    """The first stage of a chord's sketch.

    Args:
        listed: ``[name, rows, columns]`` of each, as a file says it.
        factors: Side -> name -> factor.

    Returns:
        Name -> sketch, without the training side.

    Raises:
        ValueError: If the list is none, or has a name twice.
    """
    for name, *sizes in listed:
        if not isinstance(name, str) or len(sizes) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in sizes):
            raise ValueError(f"a sketch of {str(name)[:80]!r} without two sizes")
    sketches = {
        name: KroneckerSketch(rows, columns, None, None, *(factors[side].get(name) for side in FACTORS))
        for name, rows, columns in listed
    }
    if len(sketches) != len(listed):
        raise ValueError("two sketches of one parameter")
    return sketches


def check_chord(chord: Chord) -> None:
    """Refuse a chord whose parts are not of one another.

    Args:
        chord: As read from a file.

    Raises:
        ValueError: Naming the part.
    """
    width, ids = check_parts(chord), chord.example_ids
    if ids.dim() != 1 or ids.dtype != torch.long or chord.self_inner.shape != ids.shape:
        raise ValueError(
            f"example ids {tuple(ids.shape)} of {ids.dtype}, {tuple(chord.self_inner.shape)} inner products"
        )
    if chord.rows.shape != (len(ids), width):
        raise ValueError(f"rows of {tuple(chord.rows.shape)} for {len(ids)} examples x {width}")


def check_parts(chord: PathChord) -> int:
    """Refuse a chord whose parts, but its examples, are not of one another.

    Args:
        chord: As read from a file.

    Returns:
        The numbers that a row must have.

    Raises:
        ValueError: Naming the part.
    """
    features = sum(_checked(name, sketch).features for name, sketch in chord.sketches.items())
    stage = chord.second_stage
    if stage is not None and (stage.dim() != 2 or stage.shape[1] != features or not stage.is_floating_point()):
        raise ValueError(f"second stage of {tuple(stage.shape)} {stage.dtype} for {features} features")
    if not chord.start or not chord.sketches.keys() <= chord.start.keys() or chord.delta.keys() != chord.start.keys():
        raise ValueError("start, displacement and sketches are of different parameters")
    for kind in ("delta", "preconditioner", "decay", "residual"):
        _check_like(kind, getattr(chord, kind), chord.start)
    if chord.start_buffers.keys() != chord.end_buffers.keys():
        raise ValueError("buffers at the two ends differ")
    _check_like("end_buffers", chord.end_buffers, chord.start_buffers)
    for name, sketch in chord.sketches.items():
        if matrix_shape(chord.start[name].shape) != (sketch.rows, sketch.columns):
            raise ValueError(f"sketch of {name!r} for {sketch.rows} x {sketch.columns}")
    return features if stage is None else int(stage.shape[0])


def _check_like(kind: str, values: Tensors, like: Tensors) -> None:
    for name, value in values.items():
        if name not in like or value.shape != like[name].shape or value.dtype != like[name].dtype:
            raise ValueError(f"{kind} of {name!r} does not fit")


def _checked(name: str, sketch: KroneckerSketch) -> KroneckerSketch:
    for d, factor in ((sketch.rows, sketch.query_left), (sketch.columns, sketch.query_right)):
        if factor is None:
            continue
        if factor.dim() != 2 or factor.shape[1] != d or d < 1 or not factor.is_floating_point():
            raise ValueError(f"factor of {name!r} of {tuple(factor.shape)} {factor.dtype} for a dimension of {d}")
    return sketch
