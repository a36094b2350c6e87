"""A chord to and from one file of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.sketch import KroneckerSketch
from lightning_pathkernel.store import ArtifactError, read_group, write_group

__all__ = ["chord_name", "read_chord", "write_chord"]

_MAPS = ("start", "delta", "start_buffers", "end_buffers", "preconditioner", "decay", "residual")
_FACTORS = ("train_left", "train_right", "query_left", "query_right")


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
    groups = {name: dict(getattr(chord, name)) for name in _MAPS}
    for factor in _FACTORS:
        found = {name: getattr(sketch, factor) for name, sketch in chord.sketches.items()}
        groups[factor] = {name: t for name, t in found.items() if t is not None}
    groups["rows"] = {"example_ids": chord.example_ids, "rows": chord.rows, "self_inner": chord.self_inner}
    if chord.second_stage is not None:
        groups["rows"]["second_stage"] = chord.second_stage
    if chord.names:
        groups["names"] = {"utf8": encode_names(chord.names)}
    facts = {
        "index": chord.index,
        "first_step": chord.first_step,
        "last_step": chord.last_step,
        "learning_time": chord.learning_time,
        "sketches": [[name, sketch.rows, sketch.columns] for name, sketch in chord.sketches.items()],
    }
    return write_group(directory / chord_name(chord.index), groups, facts)


def read_chord(path: Path) -> Chord:
    """Read a chord back.

    Args:
        path: A file that `write_chord` wrote.

    Returns:
        The chord, on the CPU.

    Raises:
        ArtifactError: If the file is damaged, or its parts do not fit together.
    """
    groups, facts = read_group(path)
    try:
        return _assemble(groups, facts)
    except (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{path.name}: not a chord: {error!r}") from error


def _assemble(groups: dict[str, dict[str, Any]], facts: dict[str, Any]) -> Chord:
    factors = {factor: groups.get(factor, {}) for factor in _FACTORS}
    sketches = {
        name: KroneckerSketch(rows, columns, *(factors[factor].get(name) for factor in _FACTORS))
        for name, rows, columns in facts["sketches"]
    }
    stored = groups["rows"]
    chord = Chord(
        int(facts["index"]), int(facts["first_step"]), int(facts["last_step"]), float(facts["learning_time"]),
        stored["example_ids"], stored["rows"], stored["self_inner"], sketches, stored.get("second_stage"),
        **{name: groups.get(name, {}) for name in _MAPS},
        names=decode_names(groups["names"]["utf8"]) if "names" in groups else {},
    )  # fmt: skip
    _check_shapes(chord)
    return chord


def _check_shapes(chord: Chord) -> None:
    features = sum(_checked(name, sketch).features for name, sketch in chord.sketches.items())
    stage, ids = chord.second_stage, chord.example_ids
    width = features if stage is None else int(stage.shape[0])
    if stage is not None and (stage.dim() != 2 or stage.shape[1] != features):
        raise ValueError(f"second stage of {tuple(stage.shape)} for {features} features")
    if ids.dim() != 1 or ids.dtype != torch.long or chord.self_inner.shape != ids.shape:
        raise ValueError(
            f"example ids {tuple(ids.shape)} of {ids.dtype}, {tuple(chord.self_inner.shape)} inner products"
        )
    if chord.rows.shape != (len(ids), width):
        raise ValueError(f"rows of {tuple(chord.rows.shape)} for {len(ids)} examples x {width}")
    if not chord.start or chord.start.keys() != chord.sketches.keys() or chord.delta.keys() != chord.start.keys():
        raise ValueError("start, displacement and sketches are of different parameters")
    for kind in ("delta", "preconditioner", "decay", "residual"):
        _check_like(kind, getattr(chord, kind), chord.start)
    if chord.start_buffers.keys() != chord.end_buffers.keys():
        raise ValueError("buffers at the two ends differ")
    _check_like("end_buffers", chord.end_buffers, chord.start_buffers)
    for name, sketch in chord.sketches.items():
        if matrix_shape(chord.start[name].shape) != (sketch.rows, sketch.columns):
            raise ValueError(f"sketch of {name!r} for {sketch.rows} x {sketch.columns}")


def _check_like(kind: str, values: Tensors, like: Tensors) -> None:
    for name, value in values.items():
        if name not in like or value.shape != like[name].shape or value.dtype != like[name].dtype:
            raise ValueError(f"{kind} of {name!r} does not fit")


def _checked(name: str, sketch: KroneckerSketch) -> KroneckerSketch:
    for d, pair in (
        (sketch.rows, (sketch.train_left, sketch.query_left)),
        (sketch.columns, (sketch.train_right, sketch.query_right)),
    ):
        found = [tuple(factor.shape) for factor in pair if factor is not None]
        if found and (len(found) != 2 or found[0] != found[1] or len(found[0]) != 2 or found[0][1] != d or d < 1):
            raise ValueError(f"factors of {name!r} of shapes {found} for a dimension of {d}")
    return sketch
